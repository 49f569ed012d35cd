"""What ranks the clients can hold: one number, a list, or FlexLoRA's resource distributions (arXiv 2402.11505)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.data.keys import nearest, stream
from fedlora.errors import UserError


@dataclass(frozen=True)
class RankProfile:
    """A client's LoRA rank at attention sites and at MLP (and all other) sites."""

    attention: int
    mlp: int


# The paper's resource types 1 to 4, and the same four steps for small models.
TYPES: tuple[RankProfile, ...] = (RankProfile(8, 8), RankProfile(30, 30), RankProfile(30, 200), RankProfile(200, 200))
SMALL_TYPES: tuple[RankProfile, ...] = tuple(RankProfile(r, r) for r in (2, 4, 8, 16))

# Percent of the clients of each type. "released": as in the authors' code, which differs from the paper.
SHARES: Mapping[str, tuple[float, float, float, float]] = {
    "uniform": (25, 25, 25, 25),
    "heavy-tail-light": (85, 5, 5, 5),
    "heavy-tail-strong": (5, 5, 5, 85),
    "normal": (5.75, 44.25, 44.25, 5.75),
    "heavy-tail-light-released": (80, 5, 5, 10),
    "heavy-tail-strong-released": (5, 5, 10, 80),
}
DISTRIBUTIONS: Mapping[str, tuple[tuple[float, ...], tuple[RankProfile, ...]]] = {
    name + ending: (shares, types)
    for ending, types in (("", TYPES), ("-small", SMALL_TYPES))
    for name, shares in SHARES.items()
}


Rank = int | RankProfile


def ranks(spec: Rank | Sequence[Rank] | str, client_ids: Sequence[str], seed: int) -> dict[str, RankProfile]:
    """Client id -> ranks, from `[clients] ranks`: one for all, a list cycled over the clients, or a distribution.

    A distribution gives each type its share of the clients (largest remainder), shuffled by the seed.
    Raises `UserError` for ranks below 1 and unknown names.

    >>> [profile.mlp for profile in ranks([2, 8], ["a", "b", "c"], seed=0).values()]
    [2, 8, 2]
    >>> sorted(profile.mlp for profile in ranks("heavy-tail-light-small", list("abcdefgh"), seed=0).values())
    [2, 2, 2, 2, 2, 2, 2, 4]
    """
    if isinstance(spec, str):
        if spec not in DISTRIBUTIONS:
            raise UserError(
                f"clients.ranks: there is no distribution {spec!r}{nearest(spec, DISTRIBUTIONS)}",
                f"use a number, a list of numbers, or one of {', '.join(DISTRIBUTIONS)}",
            )
        shares, types = DISTRIBUTIONS[spec]
        counts = largest_remainder(shares, len(client_ids))
        drawn = stream(seed, "ranks").permutation(np.repeat(np.arange(len(types)), counts))
        return {name: types[kind] for name, kind in zip(client_ids, drawn, strict=True)}
    cycle = list(spec) if isinstance(spec, Sequence) else [spec]
    given = [one if isinstance(one, RankProfile) else RankProfile(one, one) for one in cycle]
    numbers = [rank for one in given for rank in (one.attention, one.mlp)]
    if not numbers or any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 for rank in numbers):
        raise UserError(f"clients.ranks = {spec!r}: ranks are whole numbers from 1", "for example ranks = [2, 4, 8]")
    return {name: given[i % len(given)] for i, name in enumerate(client_ids)}


def largest_remainder(shares: Sequence[float], total: int) -> np.ndarray:
    """(len(shares),) whole numbers in proportion to `shares` that sum to `total`; ties go to the earlier share.

    >>> largest_remainder([5.75, 44.25, 44.25, 5.75], 10).tolist()
    [1, 4, 4, 1]
    """
    exact = np.asarray(shares, dtype=float) * total / sum(shares)
    counts = np.floor(exact + 1e-9).astype(np.int64)
    first = np.argsort(-(exact - counts), kind="stable")
    counts[first[: total - int(counts.sum())]] += 1
    return counts
