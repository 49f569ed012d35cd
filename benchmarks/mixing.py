"""CE-LoRA's server: the distances between clients at introduction, and a round's mixtures, at up to 1,000 clients.

The functions are the library's own. Statistics are those of real mixtures, fitted to drawn features; cores are random,
which changes no size. Where all pairs would take too long, some are timed and multiplied by their number.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Report

SITES, RANK, WIDTH, LABELS, PER_CLASS, PROJECT = 12, 8, 384, 4, 30, 32
"""MiniLM's query and value; 30 examples are the fewest that a class has three components of."""
COUNTS, QUICK = (10, 100, 1000), (10, 30)
FITTED = 20
"""Clients whose mixtures are fitted; the others have theirs, moved."""
PAIRS = 2000
"""Distances that are timed at most."""
Statistics = Mapping[str, Tensor]


def features(seed: int) -> tuple[Tensor, Tensor]:
    """(examples, width) of one client, and their labels: classes around points of their own."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(LABELS, 1, WIDTH, generator=draws)
    x = centres + 0.5 * torch.randn(LABELS, PER_CLASS, WIDTH, generator=draws)
    return x.flatten(0, 1), torch.arange(LABELS).repeat_interleave(PER_CLASS)


def fitted() -> tuple[list[Statistics], float]:
    """Some clients' statistics, and the seconds that one client takes for them."""
    from fedlora.algorithms.similarity import statistics

    given = [features(seed) for seed in range(FITTED)]
    statistics(*given[0], PROJECT, 0)  # the first call imports
    start = time.perf_counter()
    return [statistics(*one, PROJECT, 0) for one in given], (time.perf_counter() - start) / FITTED


def moved(known: Sequence[Statistics], number: int) -> Statistics:
    """A client's statistics: those of a fitted one, all means moved."""
    one = known[number % len(known)]
    draws = torch.Generator().manual_seed(number)
    shift = torch.randn(one["means"].shape[1], generator=draws, dtype=torch.float64)
    return {**one, "means": one["means"] + 0.1 * shift}


def measured(clients: int, known: Sequence[Statistics]) -> dict[str, float]:
    """Seconds of a pair, of a round's weights and of one client's mixture; megabytes of what travels and of tables."""
    from fedlora.algorithms.ce_lora import CELoRA
    from fedlora.algorithms.similarity import distance
    from fedlora.federation.spec import Client, ModelSpec
    from fedlora.federation.wire import frame_size

    spec = ModelSpec(
        {str(k): (WIDTH, WIDTH) for k in range(SITES)}, {str(k): RANK for k in range(SITES)}, {}, (), WIDTH
    )
    names = [f"{k:04d}" for k in range(clients)]
    each = {name: moved(known, k) for k, name in enumerate(names)}
    pairs = clients * (clients - 1) // 2
    step = max(1, pairs // PAIRS)
    timed = list(islice(combinations(names, 2), 0, None, step))
    start = time.perf_counter()
    found = [distance(each[i], each[j]) for i, j in timed]
    pair = (time.perf_counter() - start) / len(timed)
    # the others' distances are copies: what is done with them does not depend on their values
    filled: dict[str, dict[str, float]] = {}
    for k, (i, j) in enumerate(combinations(names, 2)):
        filled.setdefault(i, {})[j] = found[min(k // step, len(found) - 1)]
    algorithm = CELoRA()
    state: Any = {**algorithm.server_init(spec, 0), "statistics": each, "distances": filled}
    value = {name: {"arrays": cores(k), "weight": 1.0} for k, name in enumerate(names)}
    start = time.perf_counter()
    state = algorithm.server_update(state, value, 1)
    update = time.perf_counter() - start
    start = time.perf_counter()
    served = algorithm.broadcast(state, Client(names[0], spec.ranks), 2)
    return {
        "pair": pair,
        "pairs": pairs,
        "update": update,
        "broadcast": time.perf_counter() - start,
        "up": frame_size(served),
        "statistics": frame_size(each[names[0]]),
        "checkpoint": frame_size(state),
    }


def cores(seed: int) -> dict[str, Tensor]:
    """What one client sends in a round."""
    draws = torch.Generator().manual_seed(seed)
    return {f"{k}/C": torch.eye(RANK) + 0.1 * torch.randn(RANK, RANK, generator=draws) for k in range(SITES)}


def run(quick: bool = False) -> Report:
    """One row for each number of clients."""
    known, fit = fitted()
    found: dict[int, dict[str, float]] = {}
    for clients in QUICK if quick else COUNTS:
        found[clients] = measured(clients, known)
        print(f"{clients} clients: {found[clients]}", file=sys.stderr)
    rows = [
        (
            f"{clients:,} clients",
            int(one["pairs"]),
            1e3 * one["pair"],
            one["pair"] * one["pairs"],
            one["update"],
            1e3 * one["broadcast"],
            one["checkpoint"] / 1e6,
        )
        for clients, one in found.items()
    ]
    return Report(
        "mixing",
        "CE-LoRA's server",
        (
            "",
            "pairs",
            "ms a pair (two-level transport)",
            "s for all pairs, once",
            "s a round (similarities, weights)",
            "ms to mix one client's cores",
            "MB of state",
        ),
        rows,
        (
            f"mixtures of {LABELS} classes of {PER_CLASS} examples: three components each in {PROJECT} dimensions; "
            f"cores of rank {RANK} at {SITES} sites, everybody in the round",
            f"at most about {PAIRS:,} pairs are timed and multiplied; distances are computed when clients are "
            "introduced, a round reuses them",
            f"a client takes {fit:.2g} s for its own mixtures, before the first round",
        ),
        {"clients": {str(clients): one for clients, one in found.items()}, "seconds_of_a_client": fit},
    )
