"""``python -m benchmarks``: all of them, or those that are named."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub

from benchmarks import (
    aggregation,
    breakdown,
    checkpointing,
    clients,
    codec,
    communication,
    flower,
    lanes,
    memory,
    mixing,
    prefix,
    scheduler,
    startup,
)
from benchmarks.peers import compare
from benchmarks.report import Report

BENCHMARKS: dict[str, Callable[[bool], Report]] = {
    "startup": startup.run,
    "communication": communication.run,
    "memory": memory.run,
    "clients": clients.run,
    "aggregation": aggregation.run,
    "mixing": mixing.run,
    "codec": codec.run,
    "scheduler": scheduler.run,
    "lanes": lanes.run,
    "breakdown": breakdown.run,
    "prefix": prefix.run,
    "checkpointing": checkpointing.run,
    "flower": flower.run,
    "peers": compare.shapes,
    "peers-many": compare.many,
}


def main() -> None:
    """Runs each, prints its table and writes it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a short run, to see that everything works")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(BENCHMARKS)):
        parser.error(f"no benchmark {unknown[0]!r}, only {', '.join(BENCHMARKS)}")
    for name in given.names or BENCHMARKS:
        report = BENCHMARKS[name](given.quick)
        print(report.markdown(given.quick), flush=True)
        print(f"wrote {report.write(given.quick)}\n", flush=True)


if __name__ == "__main__":
    main()
