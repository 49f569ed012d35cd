"""Representations by class, as they travel: one row for each class that a client has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.federation.algorithm import Update
from fedlora.federation.spec import Client, Shape


def packed(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``rows`` (classes held, 2 + width): class, number of examples, sum of their representations.

    >>> packed(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([2, 0, 2]))
    {'rows': tensor([[0., 1., 3., 4.],
            [2., 2., 6., 8.]])}
    """
    counts = torch.bincount(labels)
    sums = features.new_zeros(len(counts), features.shape[1]).index_add_(0, labels, features)
    rows = torch.cat([torch.stack([torch.arange(len(counts)), counts], 1).to(sums.dtype), sums], 1)
    return {"rows": rows[counts > 0]}


def packed_shape(width: int) -> dict[str, Shape]:
    """What ``packed`` sends: any number of rows."""
    return {"rows": (-1, 2 + width)}


def malformed(rows: Tensor, labels: int, examples: float) -> str | None:
    """What rows that somebody sent are not: classes of the model, each once, each with a whole number of examples, and
    no more of these than the client has.

    >>> malformed(torch.tensor([[1.0, 1e-35, 4.0]]), labels=3, examples=5)
    'class 1 has 1e-35 examples'
    >>> malformed(torch.tensor([[1.0, 6.0, 4.0]]), labels=3, examples=5)
    '6 examples in rows, of 5'
    """
    seen: set[float] = set()
    for row in rows:
        label, count = float(row[0]), float(row[1])
        if not (label.is_integer() and 0 <= label < labels):
            return f"{label:g} is none of {labels} classes"
        if label in seen:
            return f"class {label:g} is there twice"
        if not (count.is_integer() and count >= 1):
            return f"class {label:g} has {count:g} examples"
        seen.add(label)
    total = float(rows[:, 1].sum(dtype=torch.float64))
    return f"{total:g} examples in rows, of {examples:g}" if total > examples else None


def unpacked(rows: Tensor) -> dict[int, tuple[float, Tensor]]:
    """{class: (count, sum)} in float64, by class; rows without a class or without examples are left out."""
    found = {int(row[0]): (float(row[1]), row[2:]) for row in rows.double() if float(row[0]).is_integer()}
    return {c: found[c] for c in sorted(found) if c >= 0 and found[c][0] > 0}


@dataclass(frozen=True)
class ByClass:
    """The sums of what ``packed`` sends: {class: [count, sum]}, exact whatever the order; weights do not count."""

    streaming = True
    linear = False

    def zero(self) -> dict[str, Any]:
        return {}

    def accumulate(self, acc: Mapping[str, Tensor], client: Client, update: Update) -> dict[str, Tensor]:
        own = unpacked(update.arrays["rows"])
        return self.merge(acc, {str(c): torch.cat([total.new_tensor([n]), total]) for c, (n, total) in own.items()})

    def merge(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        both = {**a, **b}
        return {c: a[c] + b[c] if c in a and c in b else both[c] for c in sorted(both)}

    def report(self, acc: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(acc)
