"""What ``[engine] checkpointing`` saves and costs: peak memory and time of a round on MiniLM, by the size of a pass.

Every number is of a process of its own, since what an allocator keeps of one would be in the next. Run as
``python -m benchmarks.checkpointing TOKENS STEPS on|off``, this module is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.lanes import LABELS, RANK, SEED, Shape, fixed, fleet, world
from benchmarks.memory import forget_peak, peak
from benchmarks.report import ROOT, Report
from fedlora.federation.rounds import rounds
from fedlora.learning.backbone import load_backbone

LENGTH, BATCH = 128, 16
FULL, QUICK = ((2_048, 8_192, 32_768), 3), ((2_048,), 1)
"""Tokens of a pass, and steps of every client; and of a short run."""


def measure(tokens: int, steps: int, checkpointing: bool) -> dict[str, Any]:
    """Megabytes above the loaded model at the peak of a round, and its seconds, in a process of its own."""
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
        rows.append(
            (
                f"{tokens:,} tokens",
                plain["megabytes"],
                sparing["megabytes"],
                plain["megabytes"] / sparing["megabytes"],
                sparing["seconds"] / plain["seconds"],
            )
        )
        print(f"{tokens} tokens: {plain} {sparing}", file=sys.stderr)
    return Report(
        "checkpointing",
        "Gradient checkpointing: peak memory above the loaded model, MB",
        ("a pass of", "without", "with", "times less", "times the seconds"),
        rows,
        [
            f"MiniLM in float32, rank {RANK} on query and value of all six layers; sequences of {LENGTH} tokens, "
            f"batches of {BATCH}; {steps} steps of as many clients as fill a pass",
            "peak resident memory of the process from the moment that the model has worked once; adapters are equal "
            "bit for bit (tests/learning/test_checkpointing.py)",
        ],
    )


def child(tokens: int, steps: int, checkpointing: bool) -> dict[str, Any]:
    """One round in this process, after one of a single client."""
    backbone = load_backbone("minilm", "text-classification", labels=LABELS)
    spec = backbone.spec(RANK, 16.0)
    shape, lanes = Shape("long", BATCH, fixed(LENGTH)), max(1, tokens // (BATCH * LENGTH))
    if checkpointing:
        backbone.checkpoint()
    seconds = 0.0
    before = 0
    for clients in (1, lanes):
        given = world(shape, clients, steps, spec)
        before, start = forget_peak(), time.perf_counter()
        for _ in rounds(given.algorithm, spec, fleet(backbone, given, lanes, tokens), total=1, seed=SEED):
            pass
        seconds = time.perf_counter() - start
    return {"megabytes": (peak() - before) / 1e6, "seconds": seconds}


if __name__ == "__main__":
    torch.set_num_threads(2)
    tokens, steps, switch = sys.argv[1:]
    print(json.dumps(child(int(tokens), int(steps), switch == "on")))
