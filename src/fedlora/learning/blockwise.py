"""Block-diagonal attention: sequences of like length in blocks, each a few batched products.

    O = softmax(scale * Q K^T + mask) V      for each sequence and head

Short sequences of a bfloat16 model are computed in float32 (its products need no kernel compiled for the shape, and
torch's bfloat16 softmax of rows below 32 is ten times slower); longer ones in bfloat16, with shapes of which there are
few. One autograd node: every gather's backward is a gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
softmax_backward: Any = vars(torch)["_softmax_backward_data"]


@dataclass(frozen=True, eq=False)
class Block:
    """Sequences of one batched product. ``index`` (rows * heads * length,): which token and head (token * heads + head)
    each entry is gathered from, for padding the first of its sequence; ``shape``: (rows, length); ``start``, ``stop``:
    the place of its outputs; ``real`` (rows, length): where a token is, None: everywhere; ``dtype``: what it computes
    in."""

    index: Tensor
    shape: tuple[int, int]
    start: int
    stop: int
    real: Tensor | None
    dtype: torch.dtype

    def places(self, heads: int) -> np.ndarray:
        """(rows, heads, length) where each output lies."""
        return np.arange(self.start, self.stop).reshape(self.shape[0], heads, self.shape[1])


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


def block(
    starts: np.ndarray, lengths: np.ndarray, heads: int, at: int, dtype: torch.dtype, device: torch.device
) -> Block:
    """Sequences by their first token and length; ``at``: where their outputs begin."""
    rows, longest, dtype = shape(len(lengths), int(lengths.max()), dtype)
    again = np.minimum(np.arange(rows), len(lengths) - 1)  # the last sequence fills up
    starts, lengths = starts[again], lengths[again]
    real = np.arange(longest) < lengths[:, None]
    tokens = starts[:, None] + np.where(real, np.arange(longest), 0)
    index = tokens[:, None, :] * heads + np.arange(heads)[:, None]
    found = None if real.all() else torch.from_numpy(real).to(device)
    gathered = torch.from_numpy(index.reshape(-1)).to(device)
    return Block(gathered, (rows, longest), at, at + index.size, found, dtype)


def block_diagonal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    outward: Tensor,
    scale: float,
    causal: bool,
) -> Tensor:
    """``query``, ``key``, ``value``: (tokens * heads, size); ``outward`` (tokens * heads,): where in the outputs of the
    blocks each result lies, one past the last block for tokens of nobody, whose result is zero."""
    node: Any = _BlockDiagonal
    return node.apply(query, key, value, tuple(blocks), outward, scale, causal)


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
            scores = torch.baddbmm(_mask(b, len(q), causal, q), q, k.mT, alpha=scale)
            weights = torch.softmax(scores, -1)
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


def _mask(b: Block, batch: int, causal: bool, like: Tensor) -> Tensor:
    """What is added to the scores, of a shape that expands to (batch, length, length)."""
    length = b.shape[1]
    if causal:  # padding is at the right: no token looks at it
        return like.new_full((length, length), -torch.inf).triu(1)
    if b.real is None:
        return like.new_zeros(1)
    mask = torch.zeros(b.real.shape, dtype=like.dtype, device=like.device).masked_fill_(~b.real, -torch.inf)
    return mask.repeat_interleave(batch // b.shape[0], 0)[:, None, :]
