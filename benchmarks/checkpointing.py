"""What ``[engine] checkpointing`` saves and costs: peak memory and time of a round on MiniLM, by the size of a pass.

Every number is of a process of its own, since what an allocator keeps of one would be in the next. Run as
``python -m benchmarks.checkpointing TOKENS STEPS on|off``, this module is that process.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.lanes import LABELS, RANK, SEED, Shape, fixed, fleet, world
from benchmarks.memory import forget_peak, peak
from benchmarks.report import ROOT, Report
from fedlora.federation.rounds import rounds
from fedlora.learning.loading import load_backbone

LENGTH, BATCH = 128, 16
FULL, QUICK = ((2_048, 8_192, 32_768), 2), ((2_048,), 1)
"""Tokens of a pass, and steps of every client; and of a short run."""


def measure(tokens: int, steps: int, checkpointing: bool) -> dict[str, Any]:
    """Megabytes at the peak of a round, and its seconds, in a process of its own."""
    switch = "on" if checkpointing else "off"
    words = [sys.executable, "-m", "benchmarks.checkpointing", str(tokens), str(steps), switch]
    done = subprocess.run(words, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(quick: bool = False) -> Report:
    """Without and with it, for every size of a pass."""
    sizes, steps = QUICK if quick else FULL
    rows: list[tuple[object, ...]] = []
    for tokens in sizes:
        plain, sparing = (measure(tokens, steps, on) for on in (False, True))
        print(f"{tokens} tokens: {plain} {sparing}", file=sys.stderr)
        tensors, resident, seconds = (
            (plain[what], sparing[what], plain[what] / sparing[what]) for what in ("tensors", "resident", "seconds")
        )
        rows.append((f"{tokens:,} tokens", *tensors, *resident, 1 / seconds[2]))
    return Report(
        "checkpointing",
        "Gradient checkpointing: peak memory of a round, MB",
        (
            "a pass of",
            "tensors, without",
            "with",
            "times less",
            "the process, without",
            "with",
            "times less",
            "times the seconds",
        ),
        rows,
        [
            f"MiniLM in float32, rank {RANK} on query and value of all six layers; sequences of {LENGTH} tokens, "
            f"batches of {BATCH}; {steps} steps of as many clients as fill a pass",
            "tensors: what torch has allocated beyond the model, by its profiler; the process: resident pages beyond "
            "the loaded libraries, the model and the gaps that the allocator keeps included",
            "adapters are equal bit for bit (tests/learning/test_checkpointing.py)",
        ],
    )


def child(tokens: int, steps: int, checkpointing: bool) -> dict[str, Any]:
    """A round in this process, then another under the profiler."""
    loaded = forget_peak()
    backbone = load_backbone("minilm", "text-classification", labels=LABELS)
    spec = backbone.spec(RANK, 16.0)
    lanes = max(1, tokens // (BATCH * LENGTH))
    given = world(Shape("long", BATCH, fixed(LENGTH)), lanes, steps, spec)
    if checkpointing:
        backbone.checkpoint()

    def once() -> None:
        for _ in rounds(given.algorithm, spec, fleet(backbone, given, lanes, tokens), total=1, seed=SEED):
            pass

    start = time.perf_counter()
    once()
    seconds, resident = time.perf_counter() - start, peak() - loaded
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        once()
    return {"tensors": allocated(seen) / 1e6, "resident": resident / 1e6, "seconds": seconds}


def allocated(seen: Any) -> int:
    """The most bytes of tensors at a time inside a profile, above what there was at its start."""
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


if __name__ == "__main__":
    torch.set_num_threads(2)
    tokens, steps, switch = sys.argv[1:]
    print(json.dumps(child(int(tokens), int(steps), switch == "on")))
