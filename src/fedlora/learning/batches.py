"""Sequences of all lanes, sorted by length and cut into groups with little padding; within a group, sorted by lane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedlora.adapters.lora import Segment

SLACK = 64
"""Padding tokens that cost less than another pass."""


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of one forward pass. ``lanes``, ``places`` (position in the lane's batch) and ``units``: (rows,)."""

    lanes: np.ndarray
    places: np.ndarray
    units: np.ndarray
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return len(self.units)


def cut(work: Mapping[int, np.ndarray], lengths: np.ndarray, budget: int) -> list[Group]:
    """``work``: the units of each lane. A group ends where its tokens would pass the budget, or its padding a fifth of
    them and more than a pass of its own would cost.

    The largest group comes first: smaller ones fit into the memory that it leaves, where growing ones would each need
    more of it (half the peak of a step).

    >>> lengths = np.array([10, 11, 50, 12])
    >>> for g in cut({0: np.array([0, 2]), 1: np.array([3, 1])}, lengths, 99):
    ...     print(g.lanes, g.units, g.segments)
    [0] [2] ((0, 0, 1),)
    [0 1 1] [0 3 1] ((0, 0, 1), (1, 1, 3))
    """
    return sorted(_groups(work, lengths, budget), key=lambda g: -len(g.units) * int(lengths[g.units].max()))


def _groups(work: Mapping[int, np.ndarray], lengths: np.ndarray, budget: int) -> Iterator[Group]:
    lanes = np.concatenate([np.full(len(units), lane) for lane, units in work.items()])
    places = np.concatenate([np.arange(len(units)) for units in work.values()])
    units = np.concatenate(list(work.values()))
    order = np.lexsort((places, lanes, lengths[units]))
    sizes = lengths[units][order].tolist()
    start, real = 0, sizes[0] if sizes else 0
    for i in range(1, len(order) + 1):
        if i < len(order):
            tokens = (i + 1 - start) * sizes[i]
            if tokens <= budget and tokens - real - sizes[i] <= max(SLACK, tokens // 5):
                real += sizes[i]
                continue
        picked = order[start:i]
        picked = picked[np.lexsort((places[picked], lanes[picked]))]
        yield Group(lanes[picked], places[picked], units[picked], segments(lanes[picked]))
        start, real = i, sizes[i] if i < len(order) else 0


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


LENGTH, TOKENS = 8, 64


def steady(inputs: dict[str, Tensor], labels: Tensor, longest: int) -> tuple[dict[str, Tensor], Tensor]:
    """A text batch of one of few shapes: its length a multiple of 8 (at most ``longest``), its tokens one of 64, by
    rows of padding at the end. Labels grow in length only: what is added has none.

    oneDNN compiles a bfloat16 kernel for every number of tokens, which takes longer than a pass and is never forgotten.

    >>> ids = torch.ones(3, 5, dtype=torch.int64)
    >>> grown, labels = steady({"input_ids": ids, "attention_mask": ids}, torch.tensor([0, 1, 2]), 40)
    >>> grown["input_ids"].shape, int(grown["attention_mask"].sum()), len(labels)
    (torch.Size([8, 8]), 20, 3)
    """
    rows, length = inputs["attention_mask"].shape
    longer = max(min(length + -length % LENGTH, longest) - length, 0)
    more = -rows % (TOKENS // gcd(TOKENS, length + longer))
    grown = {name: functional.pad(value, (0, longer, 0, more)) for name, value in inputs.items()}
    grown["attention_mask"][rows:, 0] = 1  # attention to nothing at all is not a number
    return grown, functional.pad(labels, (0, longer), value=-100) if labels.dim() == 2 else labels


def to_device(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs where the model is; floating-point ones in its type."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
        for name, value in inputs.items()
    }
