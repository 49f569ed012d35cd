"""What fedlora costs, measured: ``python -m benchmarks [lanes memory startup] [--quick]``."""
