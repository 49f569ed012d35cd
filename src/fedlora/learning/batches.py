"""Sequences of all lanes, sorted by length and cut into groups with little padding; within a group, sorted by lane."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedlora.adapters.lora import Segment

PASS, FAST = 96, 192
"""Tokens that cost as much as another pass: Python, small matrices, one more segment of each lane; and where tokens are
computed fast (bfloat16 on a CPU)."""
ROWS = 512
"""Rows whose groups are chosen together."""
FEWEST, MOST = 4, 32
"""Lanes that are taken where nobody says how many."""
Computed = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Rows and longest of groups -> tokens that are computed for them."""
Choice = Callable[[np.ndarray, int], list[tuple[int, int]]]
"""Sorted lengths and a budget of tokens -> runs of them that are groups."""


def rectangle(rows: np.ndarray, longest: np.ndarray) -> np.ndarray:
    """Every row as long as the longest."""
    return rows * longest


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of one forward pass. ``lanes``, ``places`` (position in the lane's batch) and ``units``: (rows,)."""

    lanes: np.ndarray
    places: np.ndarray
    units: np.ndarray
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return len(self.units)


def rectangles(sizes: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Groups of padded sequences."""
    return borders(sizes, budget, rectangle)


def cut(work: Mapping[int, np.ndarray], lengths: np.ndarray, budget: int, choose: Choice = rectangles) -> list[Group]:
    """``work``: the units of each lane, sorted by length and cut into groups of at most ``budget`` tokens (a single
    sequence may have more), as ``choose`` does.

    The largest group comes first: smaller ones fit into the memory that it leaves, where growing ones would each need
    more of it (half the peak of a step).

    >>> lengths = np.array([10, 11, 150, 12])
    >>> for g in cut({0: np.array([0, 2]), 1: np.array([3, 1])}, lengths, 199):
    ...     print(g.lanes, g.units, g.segments)
    [0] [2] ((0, 0, 1),)
    [0 1 1] [0 3 1] ((0, 0, 1), (1, 1, 3))
    """
    lanes = np.concatenate([np.full(len(units), lane) for lane, units in work.items()])
    places = np.concatenate([np.arange(len(units)) for units in work.values()])
    units = np.concatenate(list(work.values()))
    order = np.lexsort((places, lanes, lengths[units]))
    groups: list[Group] = []
    for start, stop in choose(lengths[units][order].astype(np.int64), budget):
        picked = order[start:stop]
        picked = picked[np.lexsort((places[picked], lanes[picked]))]
        groups.append(Group(lanes[picked], places[picked], units[picked], segments(lanes[picked])))
    return sorted(groups, key=lambda g: -len(g.units) * int(lengths[g.units].max()))


def evenly(sizes: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """As few runs of sequences without padding as the budget allows, with about as many tokens each.

    >>> evenly(np.array([2, 2, 2, 3, 3, 9]), 12)
    [(0, 5), (5, 6)]
    """
    upto = sizes.cumsum()
    found: list[tuple[int, int]] = []
    start = done = 0
    while start < len(sizes):
        left = int(upto[-1]) - done
        fair = left / -(-left // budget)
        stop = max(start + 1, int(np.searchsorted(upto, done + budget, "right")))
        stop = max(start + 1, min(stop, int(np.searchsorted(upto, done + fair, "left")) + 1))
        found.append((start, stop))
        start, done = stop, int(upto[stop - 1])
    return found


def parted(sizes: np.ndarray, budget: int, limit: int, longer: Choice) -> list[tuple[int, int]]:
    """Sequences of at most ``limit`` tokens, which run without padding, ``evenly``; those beyond as ``longer`` does.

    >>> parted(np.array([2, 2, 3, 200, 201]), 1000, 100, rectangles)
    [(0, 3), (3, 5)]
    """
    short = int(np.searchsorted(sizes, limit, "right"))
    rest = longer(sizes[short:], budget)
    return [*evenly(sizes[:short], budget), *((short + start, short + stop) for start, stop in rest)]


def borders(sizes: np.ndarray, budget: int, computed: Computed, another: int = PASS) -> list[tuple[int, int]]:
    """The cheapest cut of sorted sizes into runs: tokens computed, padding included, and passes (each as much as
    ``another`` tokens) cost least together.

    By dynamic programming, ``ROWS`` at a time: the best cut of the first ``e`` ends with the run of k rows for which
    the best cut of the first ``e - k``, and the run, cost least.

    >>> borders(np.array([2, 2, 2, 200, 201]), 1000, rectangle)
    [(0, 3), (3, 5)]
    """
    return [
        (first + start, first + stop)
        for first in range(0, len(sizes), ROWS)
        for start, stop in _cheapest(sizes[first : first + ROWS], budget, computed, another)
    ]


def _cheapest(sizes: np.ndarray, budget: int, computed: Computed, another: int) -> list[tuple[int, int]]:
    count = len(sizes)
    most = max(1, min(count, budget // max(1, int(sizes[0]))))
    rows = np.arange(1, most + 1)
    tokens = computed(np.broadcast_to(rows, (count, most)), np.broadcast_to(sizes[:, None], (count, most)))
    cost = np.where((rows == 1) | (tokens <= budget), another + tokens, np.inf)
    best, last = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        known = min(end, most)
        total = best[end - known : end][::-1] + cost[end - 1, :known]
        last[end] = total.argmin() + 1
        best[end] = total[last[end] - 1]
    found: list[tuple[int, int]] = []
    while count:
        found.append((count - int(last[count]), count))
        count -= int(last[count])
    return found[::-1]


def lanes_for(tokens: int, lengths: np.ndarray, batch: int, clients: int) -> int:
    """How many clients' batches fill a pass of so many tokens: at least ``FEWEST`` and at most ``MOST``, or a few less
    such that the clients of a round take turns in equal shares.

    >>> lengths = np.array([10, 30])
    >>> lanes_for(2048, lengths, 8, 1000), lanes_for(2048, lengths, 2, 1000), lanes_for(2048, lengths, 2, 40)
    (13, 32, 20)
    """
    wanted = -(-tokens // max(1, round(batch * float(lengths.mean())))) if len(lengths) else FEWEST
    most = max(1, min(max(wanted, FEWEST), MOST))
    turns = max(1, -(-clients // most))
    return max(1, -(-clients // turns))


def segments(lanes: np.ndarray) -> tuple[Segment, ...]:
    """Runs of equal lanes.

    >>> segments(np.array([0, 0, 3]))
    ((0, 0, 2), (3, 2, 3))
    """
    borders = [0, *(np.flatnonzero(np.diff(lanes)) + 1).tolist(), len(lanes)]
    return tuple((int(lanes[a]), a, b) for a, b in pairwise(borders))


def rows_of(values: Tensor, segment: Segment) -> Tensor:
    """A segment's part of something that has one entry per row."""
    return values[segment[1] : segment[2]]


LENGTHS, TOKENS = (8, 16, 32, 64), 64


@dataclass(frozen=True)
class Steady:
    """Text batches of few shapes: their tokens a multiple of 64, by lengths that are multiples of 8, 16, 32 or 64 and
    rows of padding at the end; or as long as the ``longest`` of all, which none may exceed. Whichever needs least.

    oneDNN compiles a bfloat16 kernel for every number of tokens, which takes longer than a pass and is never forgotten.
    """

    longest: int

    def __call__(self, rows: np.ndarray, longest: np.ndarray) -> np.ndarray:
        """The tokens that a batch will have."""
        many, length = self.shape(rows, longest)
        return many * length

    def shape(self, rows: Any, longest: Any) -> tuple[np.ndarray, np.ndarray]:
        """(rows, length) of a batch of so many rows whose sequences are at most as long; numbers or arrays.

        >>> [tuple(map(int, Steady(600).shape(*given))) for given in ((8, 21), (3, 21), (1, 515), (2, 580))]
        [(8, 24), (4, 32), (1, 576), (2, 600)]
        """
        rows, longest = np.asarray(rows), np.asarray(longest)
        limit = np.maximum(self.longest, longest)
        lengths = np.stack([longest + -longest % multiple for multiple in LENGTHS])
        steps = np.where(lengths > limit, -(-TOKENS // limit), TOKENS // np.gcd(TOKENS, lengths))
        lengths, many = np.minimum(lengths, limit), rows + -rows % steps
        least = (many * lengths).argmin(0, keepdims=True)  # the shortest of equals
        return np.take_along_axis(many, least, 0)[0], np.take_along_axis(lengths, least, 0)[0]

    def grown(self, inputs: dict[str, Tensor], labels: Tensor, pad: int) -> tuple[dict[str, Tensor], Tensor]:
        """A batch of such a shape. Labels grow in length only: what is added has none. ``pad``: the token that is
        added, by which some models find the last one of a text.

        >>> ids = torch.ones(3, 5, dtype=torch.int64)
        >>> grown, labels = Steady(40).grown({"input_ids": ids, "attention_mask": ids}, torch.tensor([0, 1, 2]), 7)
        >>> grown["input_ids"].shape, int(grown["attention_mask"].sum()), len(labels)
        (torch.Size([8, 8]), 20, 3)
        >>> grown["input_ids"][0].tolist()
        [1, 1, 1, 1, 1, 7, 7, 7]
        """
        rows, length = inputs["attention_mask"].shape
        wanted = self.shape(rows, length)
        more, longer = int(wanted[0]) - rows, int(wanted[1]) - length
        fill = {"input_ids": pad}
        grown = {n: functional.pad(v, (0, longer, 0, more), value=fill.get(n, 0)) for n, v in inputs.items()}
        grown["attention_mask"][rows:, 0] = 1  # attention to nothing at all is not a number
        return grown, functional.pad(labels, (0, longer), value=-100) if labels.dim() == 2 else labels


def to_device(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs where the model is; floating-point ones in its type."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
        for name, value in inputs.items()
    }
