"""The store of examples that all clients share, what a task is, and what tasks have in common.

A *row* is a row of the user's table; a *unit* is what a batch is made of. They differ for long texts of a language
model, which are cut into windows; ``Examples.units`` maps one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedlora.errors import UserError
from fedlora.federation.orders import label_loss

Inputs = Mapping[str, Tensor]
Totals = Mapping[str, tuple[Tensor, Tensor]]
"""(totals, counts), one number per unit each, by the score's name."""
Array = np.ndarray[Any, Any]
SLICE = 1000
"""Rows that are tokenised at once: memory stays flat."""
MANY = 20_000
"""Rows from which texts are tokenised when they are needed: all at once would take longer than a round."""


@dataclass(frozen=True, eq=False)
class Examples:
    """One store for all clients, flat in memory.

    ``lengths``: (units,) tokens of each unit (image patches count as tokens); ``labels``: (units,) class indices (zeros
    for a language model); ``rows``: (rows + 1,) where each row's units begin. Text: ``tokens`` (int32, all units one
    after the other), ``offsets`` (units + 1,). Language models: ``first`` (units,), the position of the first predicted
    token, ``bytes`` (units,), how many bytes of text the predicted tokens stand for. Images: ``pixels`` (units, height,
    width, channels) uint8, and ``prepare``, which makes them (units, channels, height, width) as the model wants them.
    """

    lengths: Array
    labels: Array
    rows: Array
    tokens: Array | None = None
    offsets: Array | None = None
    types: Array | None = None
    first: Array | None = None
    bytes: Array | None = None
    pixels: Array | None = None
    pad: int = 0
    prepare: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def single(self) -> bool:
        """Whether every row is one unit. (A row may also have none: as many units as rows do not tell.)"""
        return np.array_equal(self.rows, np.arange(len(self.rows)))

    def spread(self, count: int) -> Array:
        """So many rows, evenly spread, or all of them.

        >>> Examples(np.ones(5), np.zeros(5), np.arange(6)).spread(3).tolist()
        [0, 2, 4]
        """
        rows = len(self.rows) - 1
        return np.linspace(0, rows - 1, min(count, rows)).astype(np.int64)

    def units(self, rows: Array) -> Array:
        """The units of some rows, in their order.

        >>> store = Examples(np.ones(4), np.zeros(4), np.array([0, 1, 3, 4]))
        >>> store.units(np.array([2, 1])).tolist()
        [3, 1, 2]
        >>> Examples(np.ones(2), np.zeros(2), np.array([0, 0, 2])).units(np.array([1])).tolist()  # an empty row
        [0, 1]
        """
        rows = np.asarray(rows, dtype=np.int64)
        if self.single:
            return rows
        parts = [np.arange(int(self.rows[row]), int(self.rows[row + 1])) for row in rows]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def count(self, rows: Array) -> int:
        """How many units some rows have.

        >>> Examples(np.ones(4), np.zeros(4), np.array([0, 1, 3, 4])).count(np.array([1, 2]))
        3
        """
        if self.single:
            return len(rows)
        return int((self.rows[rows + 1] - self.rows[rows]).sum())

    def padded(self, units: Array, values: Array | None = None, fill: int | None = None) -> Tensor:
        """(units, longest) int64 token ids (or other per-token values), padded on the right."""
        assert self.tokens is not None
        assert self.offsets is not None
        values = self.tokens if values is None else values
        lengths = self.lengths[units]
        out = np.full((len(units), int(lengths.max(initial=0))), self.pad if fill is None else fill, dtype=np.int64)
        for i, (unit, length) in enumerate(zip(units, lengths)):
            start = self.offsets[unit]
            out[i, :length] = values[start : start + length]
        return torch.from_numpy(out)

    def mask(self, units: Array) -> Tensor:
        """(units, longest) int64: 1 where there is a token."""
        lengths = torch.from_numpy(self.lengths[units].astype(np.int64))
        return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


@dataclass(frozen=True, eq=False)
class Later(Examples):
    """Texts that are tokenised when their units are first asked for: of a large population, few are in a round.

    ``read``: rows -> token ids of each; ``known``: (rows,) bool, which are in ``tokens``; ``used``: (1,) how many of
    these are taken. ``lengths`` has one more unit, which no row has, as long as any may be: what depends on the
    longest must not depend on who was asked so far.
    """

    read: Callable[[Array], Sequence[Sequence[int]]] = lambda rows: ()
    known: Array = field(default_factory=lambda: np.zeros(0, dtype=bool))
    used: Array = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.known)

    def units(self, rows: Array) -> Array:
        """A row is a unit; those that were not read yet are."""
        rows = np.asarray(rows, dtype=np.int64)
        new = np.unique(rows[~self.known[rows]])
        for start in range(0, len(new), SLICE):
            self._add(new[start : start + SLICE])
        return rows

    def _add(self, rows: Array) -> None:
        assert self.tokens is not None
        assert self.offsets is not None
        for row, ids in zip(rows.tolist(), self.read(rows), strict=True):
            start = int(self.used[0])
            self.tokens[start : start + len(ids)] = ids
            self.offsets[row], self.lengths[row] = start, len(ids)
            self.used[0] += len(ids)
        self.known[rows] = True


def later(read: Callable[[Array], Sequence[Sequence[int]]], labels: Array, longest: int, pad: int) -> Later:
    """A store of which nothing is tokenised yet; ``longest``: how many tokens a text has at most.

    The room for all tokens is only asked for: pages that nobody writes to cost nothing.

    >>> store = later(lambda rows: [[7] * (row + 1) for row in rows], np.zeros(3, dtype=np.int64), longest=4, pad=0)
    >>> store.padded(store.units(np.array([2, 0]))).tolist(), store.known.tolist()
    ([[7, 7, 7], [7, 0, 0]], [True, False, True])
    """
    count = len(labels)
    return Later(
        lengths=np.full(count + 1, longest, dtype=np.int64),
        labels=labels,
        rows=np.arange(count + 1),
        tokens=np.empty(count * longest, dtype=np.int32),
        offsets=np.zeros(count + 1, dtype=np.int64),
        pad=pad,
        read=read,
        known=np.zeros(count, dtype=bool),
    )


class Task(Protocol):
    """What a run trains for."""

    @property
    def metric(self) -> tuple[str, bool]:
        """The score that decides, and whether higher is better."""
        ...

    def encode(self, table: Any, processor: Any) -> Examples:
        """The table (a ``datasets.Dataset``) as units."""
        ...

    def collate(self, examples: Examples, units: Array) -> tuple[Inputs, Tensor]:
        """A batch: the model's inputs, and labels as ``orders.Batch`` has them."""
        ...

    def score(self, logits: Tensor, labels: Tensor, examples: Examples, units: Array) -> Totals:
        """Per unit, so that they merge exactly."""
        ...


def class_scores(logits: Tensor, labels: Tensor) -> Totals:
    """Cross-entropy and accuracy per example."""
    ones = torch.ones(len(labels), dtype=torch.float64)
    correct = (logits.argmax(-1) == labels).double()
    return {"loss": (label_loss(logits, labels).double().cpu(), ones), "accuracy": (correct.cpu(), ones)}


def class_indices(table: Any, column: str, labels: Sequence[str]) -> Array:
    """(rows,) int64: the position of every row's label in the label space."""
    index = {label: i for i, label in enumerate(labels)}
    names = getattr(table.features[column], "names", None)
    values = table[column][:]
    texts = [names[v] if names and isinstance(v, int) and v >= 0 else str(v) for v in values]
    unknown = sorted({text for text in texts if text not in index})
    if unknown:
        row = next(i for i, text in enumerate(texts) if text in unknown)
        raise UserError(
            f"row {row}, column {column!r}: label {unknown[0]!r} is not one of the {len(index)} known labels",
            "add it to [data] labels, or correct the data",
        )
    return np.array([index[text] for text in texts], dtype=np.int64)


def require(table: Any, columns: Iterable[str]) -> None:
    """A missing column is named, with those that there are."""
    for column in columns:
        if column not in table.column_names:
            raise UserError(f"column {column!r} does not exist", f"the columns are {', '.join(table.column_names)}")


def slices(table: Any) -> Iterable[Mapping[str, list[Any]]]:
    """The table, some rows at a time."""
    for start in range(0, len(table), SLICE):
        yield table[start : start + SLICE]


def flattened(lists: Iterable[Sequence[int]]) -> Array:
    return np.fromiter(chain.from_iterable(lists), dtype=np.int32)


def text_store(parts: Sequence[Array], lengths: Sequence[int], labels: Array, **others: Any) -> Examples:
    size = np.asarray(lengths, dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), size.cumsum()])
    tokens = np.concatenate([np.zeros(0, dtype=np.int32), *parts])
    rows = others.pop("rows", np.arange(len(size) + 1))
    return Examples(size, labels, rows, tokens, offsets, **others)
