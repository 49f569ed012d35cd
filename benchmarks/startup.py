"""How long it takes until something is there: the import, the help page, and what a run loads."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.report import Report

REPEATS = 5
WAYS = {
    "`python -c pass`": ["-c", "pass"],
    "`import fedlora`": ["-c", "import fedlora"],
    "`fedlora --help`": ["-m", "fedlora.cli", "--help"],
    "`from fedlora import run` (torch, transformers, peft)": ["-c", "from fedlora import run"],
}


def run(quick: bool = False) -> Report:
    """Medians of wall time over fresh processes, the ways alternating; the first process of each only warms up."""
    repeats = 1 if quick else REPEATS
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way, words in WAYS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            if repeat:
                seconds[way].append(time.perf_counter() - start)
    bare = statistics.median(next(iter(seconds.values())))
    rows = [
        (way, statistics.median(own), statistics.median(own) - bare, min(own), max(own)) for way, own in seconds.items()
    ]
    return Report(
        "startup",
        "Start-up",
        ("what", "seconds", "beyond bare Python", "fastest", "slowest"),
        rows,
        (f"medians over {repeats} fresh processes each, alternating, after one that warms the file cache",),
        {"seconds": seconds},
    )
