"""What a round costs beside the learner: the loop, requests and replies, client programs, folding.

The simulator gets an executor that hands everything to the learner and keeps the time; nothing in the library is
touched. Seconds outside of it are everything that is not training, the server's aggregation included.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.lanes import LABELS, SEED, SHAPES, World, fleet, world
from benchmarks.report import Report
from fedlora.federation.client import Executor, Job
from fedlora.federation.rounds import rounds
from fedlora.learning.backbone import Backbone
from fedlora.learning.loading import load_backbone

CLIENTS, STEPS, ROUNDS = 20, 5, 5


@dataclass(eq=False)
class Clock:
    """An executor in front of another, with the seconds that the other worked and checked orders."""

    inner: Executor
    working: float = 0.0
    checking: float = 0.0

    def submit(self, job: Job) -> int:
        start = time.perf_counter()
        try:
            return self.inner.submit(job)
        finally:
            self.checking += time.perf_counter() - start

    def advance(self) -> list[tuple[int, Any | Exception]]:
        start = time.perf_counter()
        try:
            return self.inner.advance()
        finally:
            self.working += time.perf_counter() - start

    @property
    def idle(self) -> bool:
        return self.inner.idle


def measured(backbone: Backbone, given: World, lanes: int, total: int) -> dict[str, float]:
    """Medians over rounds of their seconds, of those outside of ``advance``, and of those in which orders are checked;
    the first round is left out."""
    simulator = fleet(backbone, given, lanes)
    clock = Clock(simulator.executor)
    reports = rounds(given.algorithm, given.spec, replace(simulator, executor=clock), total=total + 1, seed=SEED)
    next(reports)  # round 0: nothing is introduced
    found: list[tuple[float, float, float]] = []
    for _ in range(total + 1):
        clock.working = clock.checking = 0.0
        start = time.perf_counter()
        report = next(reports)
        report.saved()
        seconds = time.perf_counter() - start
        found.append((seconds, seconds - clock.working, clock.checking))
    whole, outside, checking = (statistics.median(column) for column in zip(*found[1:], strict=True))
    return {"seconds": whole, "outside": outside, "checking": checking}


def run(quick: bool = False) -> Report:
    """One and eight lanes on the shapes of the lanes benchmark, in the type that most runs choose."""
    clients, steps, total = (4, 1, 1) if quick else (CLIENTS, STEPS, ROUNDS)
    backbone = load_backbone("minilm", "text-classification", labels=LABELS, dtype=torch.bfloat16)
    spec = backbone.spec(8, 16.0)
    rows: list[tuple[object, ...]] = []
    details: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        given = world(shape, clients, steps, spec)
        for lanes in (1, 8):
            name = f"{shape.name}, lanes = {lanes}"
            one = details[name] = measured(backbone, given, lanes, total)
            print(f"{name}: {one}", file=sys.stderr)
            share, alone = (100 * one[what] / one["seconds"] for what in ("outside", "checking"))
            each = 1e3 * one["outside"] / clients
            rows.append((name, one["seconds"], 1e3 * one["outside"], each, share, alone))
    return Report(
        "scheduler",
        "What a round costs beside training",
        (
            "",
            "seconds a round",
            "ms outside the learner",
            "ms a client",
            "% of the round",
            "of it checking orders, %",
        ),
        rows,
        (
            f"FedIT on MiniLM in bfloat16, rank 8 on query and value, {clients} clients, {steps} steps each; medians "
            f"of {total} rounds, the first left out",
            "outside the learner: seconds of the round's loop that are not in `Learner.advance`: cohort, requests, "
            "client programs, their memories, frames' sizes, checks of updates, folding, the server's update",
        ),
        {"measured": details},
    )
