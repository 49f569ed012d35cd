"""Block-diagonal attention: sequences of like length in blocks, each a few batched products.

    O = softmax(scale * Q K^T + mask) V      for each sequence and head

A row of a block holds one sequence, or, where all numbers are finite (``together``), several end to end, of which each
sees only itself: few blocks of few lengths instead of many. Apart, short sequences of a bfloat16 model are computed in
float32 (its products need no kernel compiled for the shape, and torch's bfloat16 softmax of rows below 32 is ten times
slower); longer ones in bfloat16, with shapes of which there are few. One autograd node: every gather's backward is a
gather.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 10_000
"""Scores (queries x keys) that cost as much as another block: about twenty small operations."""
BIN = 8
"""Lengths that differ by less are not told apart when blocks are chosen."""
SHORT = 24
"""Sequences of a bfloat16 model up to this length are computed in float32."""
LENGTH, ROWS = 32, 8
"""In bfloat16 a block's length and its number of sequences are multiples of these."""
SHARED, FULL = 64, 512
"""The shortest row that several sequences share (longer ones are twice as long, and so on), and the tokens of which a
block of such rows is a multiple."""
softmax_backward: Any = vars(torch)["_softmax_backward_data"]


@dataclass(frozen=True, eq=False)
class Room:
    """Where some sequences lie: ``sequences`` (their positions in the batch), each in a ``row`` from an ``offset`` on;
    ``shape``: (rows, length); ``shared``: whether a row may hold several; ``dtype``: what they are computed in."""

    sequences: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    shape: tuple[int, int]
    shared: bool
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one batched product. ``index`` (rows * heads * length,): which token and head (token * heads + head) each
    entry is gathered from, for padding the first of its row; ``shape``: (rows, length); ``start``, ``stop``: the place
    of its outputs; ``real`` (rows, length): where a token is, None: everywhere; ``owner`` (rows, length): whose a token
    is, None: a row is one sequence; ``dtype``: what it computes in."""

    index: Tensor
    shape: tuple[int, int]
    start: int
    stop: int
    real: Tensor | None
    owner: Tensor | None
    dtype: torch.dtype

    @cached_property
    def apart(self) -> Tensor:
        """(rows, length, length): minus infinity between tokens of different sequences, else zero."""
        assert self.owner is not None
        foreign = self.owner[:, :, None] != self.owner[:, None, :]
        return torch.zeros(foreign.shape, dtype=self.dtype, device=foreign.device).masked_fill_(foreign, -torch.inf)


def partition(lengths: np.ndarray) -> list[np.ndarray]:
    """Sequences (their positions, ascending) by blocks, so that scores and blocks cost least together.

    >>> [rows.tolist() for rows in partition(np.array([200, 8, 9, 12, 190]))]
    [[1, 2, 3], [0, 4]]
    """
    binned = -(-lengths // BIN) * BIN
    longest, counts = np.unique(binned, return_counts=True)
    upto = np.concatenate([[0], counts.cumsum()])
    best, last = np.zeros(len(longest) + 1), np.zeros(len(longest) + 1, dtype=np.int64)
    for end in range(1, len(longest) + 1):
        total = best[:end] + BLOCK + (upto[end] - upto[:end]) * longest[end - 1] ** 2
        last[end] = total.argmin()
        best[end] = total[last[end]]
    found: list[np.ndarray] = []
    end = len(longest)
    while end:
        first = int(last[end])
        found.append(np.flatnonzero((binned >= longest[first]) & (binned <= longest[end - 1])))
        end = first
    return found[::-1]


def shape(rows: int, longest: int, dtype: torch.dtype) -> tuple[int, int, torch.dtype]:
    """(rows, length, type) in which a block of some sequences is computed."""
    if dtype != torch.bfloat16:
        return rows, longest, dtype
    if longest <= SHORT:
        return rows, longest, torch.float32
    return rows + -rows % ROWS, longest + -longest % LENGTH, dtype


def rooms(lengths: np.ndarray, dtype: torch.dtype, together: bool = False) -> list[Room]:
    """Where sequences of some lengths lie; ``together``: rows may be shared where that saves blocks.

    >>> [room.shape for room in rooms(np.array([20, 30, 40, 50, 100]), torch.bfloat16, together=True)]
    [(8, 64), (4, 128)]
    """
    apart = [_alone(found, lengths, dtype) for found in partition(lengths)]
    if not together or dtype != torch.bfloat16 or len(apart) < 2:
        return apart
    found = _shared(lengths)
    return found if _effort(found) < _effort(apart) else apart


def _effort(found: Sequence[Room]) -> tuple[int, int]:
    """(blocks, scores): calls cost more than numbers."""
    return len(found), sum(rows * length**2 for rows, length in (room.shape for room in found))


def _alone(found: np.ndarray, lengths: np.ndarray, dtype: torch.dtype) -> Room:
    rows, longest, dtype = shape(len(found), int(lengths[found].max()), dtype)
    return Room(found, np.arange(len(found)), np.zeros(len(found), dtype=np.int64), (rows, longest), False, dtype)


def _shared(lengths: np.ndarray) -> list[Room]:
    """Best fit, the longest first: a sequence goes into the row that it fills best, or opens one."""
    opened: list[tuple[int, int]] = []  # (room left, row), ascending
    sizes, numbers = list[int](), list[int]()  # of each row: its length, its number among those of that length
    counts: dict[int, int] = {}
    places: dict[int, list[tuple[int, int, int]]] = {}
    for k in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[k])
        fit = bisect_left(opened, (length, 0))
        if fit < len(opened):
            left, row = opened.pop(fit)
        else:
            left, row = max(SHARED, 1 << (length - 1).bit_length()), len(sizes)
            sizes.append(left)
            numbers.append(counts.get(left, 0))
            counts[left] = numbers[-1] + 1
        places.setdefault(sizes[row], []).append((k, numbers[row], sizes[row] - left))
        insort(opened, (left - length, row))
    found: list[Room] = []
    for size, given in sorted(places.items()):
        sequences, row, offset = np.array(given).T
        rows = counts[size] + -counts[size] % max(1, FULL // size)
        found.append(Room(sequences, row, offset, (rows, size), True, torch.bfloat16))
    return found


@dataclass(frozen=True, eq=False)
class Blocks:
    """A batch by blocks. ``outward`` (tokens * heads,): where in the blocks' outputs each token's heads lie, one past
    the last block for tokens of nobody, whose result is zero."""

    blocks: tuple[Block, ...]
    outward: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        """``query``, ``key``, ``value``: (tokens, heads, size), and so the result."""
        node: Any = _BlockDiagonal
        rows = (x.reshape(-1, x.shape[-1]) for x in (query, key, value))
        return node.apply(*rows, self.blocks, self.outward, scale, causal).view(query.shape)


def blocks_of(found: Sequence[Room], starts: np.ndarray, tokens: int, heads: int, device: torch.device) -> Blocks:
    """The blocks of some rooms. ``starts``: where each sequence begins, and the end of the last; ``tokens``: how many
    there are with those of nobody after it."""
    outward = np.empty((tokens, heads), dtype=np.int64)
    blocks: list[Block] = []
    size = 0
    for room in found:
        made, places, outputs = _block(room, starts[:-1], np.diff(starts), heads, size, device)
        outward[places] = outputs
        blocks.append(made)
        size = made.stop
    outward[starts[-1] :] = size  # a row of zeros
    return Blocks(tuple(blocks), torch.from_numpy(outward.reshape(-1)).to(device))


def _block(
    room: Room, starts: np.ndarray, lengths: np.ndarray, heads: int, at: int, device: torch.device
) -> tuple[Block, np.ndarray, np.ndarray]:
    """The block of a room, its tokens, and where each token's heads lie in the outputs (tokens, heads). ``starts``,
    ``lengths``: of all sequences; ``at``: where the block's outputs begin."""
    rows, length = room.shape
    starts, lengths = starts[room.sequences], lengths[room.sequences]
    total = lengths.cumsum()
    within = np.arange(total[-1]) - np.repeat(total - lengths, lengths)
    tokens, place = (np.repeat(x, lengths) + within for x in (starts, room.row * length + room.offset))
    used = int(room.row.max()) + 1
    first = np.empty(used, dtype=np.int64)
    first[room.row[::-1]] = starts[::-1]
    held, owner = np.repeat(first, length), np.full(used * length, -1)
    held[place], owner[place] = tokens, np.repeat(np.arange(len(starts)), lengths)
    again = np.minimum(np.arange(rows), used - 1)  # the last row fills up
    held, owner = (x.reshape(used, length)[again] for x in (held, owner))
    index = held[:, None, :] * heads + np.arange(heads)[:, None]
    padded, whose = (torch.from_numpy(x).to(device) for x in (owner >= 0, owner))
    real = None if bool(padded.all()) else padded
    outputs = at + (place // length * heads * length + place % length)[:, None] + np.arange(heads) * length
    gathered = torch.from_numpy(index.reshape(-1)).to(device)
    made = Block(gathered, room.shape, at, at + index.size, real, whose if room.shared else None, room.dtype)
    return made, tokens, outputs


class _BlockDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: tuple[Block, ...],
        outward: Tensor,
        scale: float,
        causal: bool,
    ) -> Tensor:
        out = _outputs(query, blocks)
        saved: list[Tensor] = []
        for b in blocks:
            q, k, v = (_gather(x, b) for x in (query, key, value))
            weights = torch.softmax(_scores(b, q, k, scale, causal), -1)
            _product(out, b, weights, v)
            saved += [q, k, v, weights]
        ctx.save_for_backward(outward, *saved)
        ctx.blocks, ctx.scale = blocks, scale
        return out.index_select(0, outward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        outward, *saved = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        into = [_outputs(grads[0], ctx.blocks) if n else None for n in need]
        for i, b in enumerate(ctx.blocks):
            q, k, v, weights = saved[4 * i : 4 * i + 4]
            g = _gather(grads[0], b)
            if b.real is not None:  # what padding says is not read, so nothing flows back into it
                g.view(b.shape[0], -1, *g.shape[1:]).mul_(b.real[:, None, :, None])
            if into[2] is not None:
                _product(into[2], b, weights.mT, g)
            if into[0] is None and into[1] is None:
                continue
            weighed = softmax_backward(g @ v.mT, weights, -1, weights.dtype)
            if into[0] is not None:
                _product(into[0], b, weighed, k, ctx.scale)
            if into[1] is not None:
                _product(into[1], b, weighed.mT, q, ctx.scale)
        return (*(None if x is None else x.index_select(0, outward) for x in into), None, None, None, None)


def _gather(values: Tensor, b: Block) -> Tensor:
    """(rows * heads, length, size)."""
    return values.index_select(0, b.index).to(b.dtype).view(-1, b.shape[1], values.shape[-1])


def _outputs(like: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Room for the blocks' outputs, one after another, and a row of zeros."""
    out = like.new_empty(blocks[-1].stop + 1, like.shape[-1])
    out[-1] = 0
    return out


def _product(out: Tensor, b: Block, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """scale * left @ right into the block's place."""
    place = out[b.start : b.stop].view(len(left), b.shape[1], -1)
    if out.dtype == b.dtype:
        torch.baddbmm(place, left, right, beta=0, alpha=scale, out=place)
    else:
        place.copy_(torch.baddbmm(left.new_zeros(1), left, right, beta=0, alpha=scale))


def _scores(b: Block, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """scale * Q K^T + mask, (rows * heads, length, length)."""
    if b.owner is None:
        return torch.baddbmm(_mask(b, len(q), causal, q), q, k.mT, alpha=scale)
    mask = b.apart + torch.full_like(b.apart[0], -torch.inf).triu(1) if causal else b.apart
    scores = torch.bmm(q, k.mT)
    wide = scores.view(b.shape[0], -1, *scores.shape[1:])
    torch.add(mask[:, None], wide, alpha=scale, out=wide)
    return scores


def _mask(b: Block, batch: int, causal: bool, like: Tensor) -> Tensor:
    """What is added to the scores, of a shape that expands to (batch, length, length)."""
    length = b.shape[1]
    if causal:  # padding is at the right: no token looks at it
        return like.new_full((length, length), -torch.inf).triu(1)
    if b.real is None:
        return like.new_zeros(1)
    mask = torch.zeros(b.real.shape, dtype=like.dtype, device=like.device).masked_fill_(~b.real, -torch.inf)
    return mask.repeat_interleave(batch // b.shape[0], 0)[:, None, :]
