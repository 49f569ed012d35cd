"""What keeping the lower layers' states (``[engine] prefix``) gains: MiniLM with adapters in its upper half only."""

from __future__ import annotations

import statistics
import sys
import time
from itertools import pairwise

import torch

from benchmarks.lanes import LABELS, RANK, SEED, SHAPES, World, fleet, world
from benchmarks.report import Report
from fedlora.federation.rounds import rounds
from fedlora.learning.backbone import Backbone
from fedlora.learning.batches import lanes_for
from fedlora.learning.loading import load_backbone
from fedlora.study.resolution import TOKENS

UPPER, ROOM = (3, 4, 5), 1 << 30
FULL, QUICK = (20, 5, 4, 2), (4, 1, 2, 1)
"""Clients, steps of each (every text once), rounds, repeats."""


def rates(backbone: Backbone, given: World, total: int, limit: int) -> list[float]:
    """Client-steps a second of every round; each trains on every text once."""
    backbone.remember(limit)
    lanes = lanes_for(TOKENS, given.examples.lengths, given.shape.batch, len(given.splits))
    reports = rounds(given.algorithm, given.spec, fleet(backbone, given, lanes, TOKENS), total=total, seed=SEED)
    moments = [time.perf_counter() for _ in reports]
    return [given.client_steps / (end - begin) for begin, end in pairwise(moments)]


def run(quick: bool = False) -> Report:
    """Without and with it, taking turns."""
    clients, steps, total, repeats = QUICK if quick else FULL
    backbone = load_backbone("minilm", "text-classification", labels=LABELS, layers=UPPER, dtype=torch.bfloat16)
    spec = backbone.spec(RANK, 16.0)
    rows: list[tuple[object, ...]] = []
    for shape in SHAPES:
        given = world(shape, clients, steps, spec)
        rates(backbone, given, 1, 0)  # warms up
        found: dict[int, list[list[float]]] = {0: [], ROOM: []}
        for _ in range(repeats):
            for limit, seen in found.items():
                seen.append(rates(backbone, given, total, limit))
                print(f"{shape.name}, {limit} bytes: {seen[-1]}", file=sys.stderr)
        plain = statistics.median(rate for one in found[0] for rate in one)
        first = statistics.median(one[0] for one in found[ROOM])
        later = statistics.median(rate for one in found[ROOM] for rate in one[1:])
        pays = 1 + (1 / first - 1 / plain) / (1 / plain - 1 / later) if later > plain else None
        rows.append((shape.name, plain, first, later, later / plain, pays))
    return Report(
        "prefix",
        "Keeping what the layers below the first adapter say of each text",
        (
            "client-steps a second",
            "without",
            "first pass over the texts",
            "later passes",
            "later against without",
            "passes over a text from which it pays",
        ),
        rows,
        [
            f"MiniLM in bfloat16, rank {RANK} on query and value of the upper three layers; {clients} "
            f"clients of {steps} steps, {total} rounds that each train on every text once; {repeats} repeats in turn",
            f"with: [engine] prefix = {ROOM:,} bytes, empty at the start of each repeat",
        ],
    )
