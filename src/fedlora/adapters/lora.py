"""The adapted layer: any linear-like base, and on it the low-rank adapters of many models ("lanes") in one pass.

    row x of lane k:   h = W0 x (+ shared change) + sum over slots of  weight_k * scale_k * B_k C_k A_k x

The rows of a batch are sorted by lane, so that each lane's rows are one contiguous segment: its factors meet its own
rows only. A non-finite number in one lane therefore never reaches another. Ranks are zero-padded to the stack's; the
padding of A, B and C receives a gradient of exactly zero.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedlora.federation.spec import derive

Segment = tuple[int, int, int]
"""(lane, first row, one past the last row)."""


@dataclass(frozen=True, eq=False)
class Factors:
    """One adapter slot at one site, stacked over lanes.

    A (lanes, r, in), B (lanes, out, r), C (lanes, r, r) or None; ``scale``: one number per lane (weight times the
    adapter's scale); ``gate``: a weight per row (rows,) that multiplies it, or None.
    """

    A: Tensor
    B: Tensor
    C: Tensor | None
    scale: tuple[float, ...]
    gate: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense change W (out, in) of one site, for a pass with a single lane; ``gate``: a weight per row or None."""

    W: Tensor
    weight: float = 1.0
    gate: Tensor | None = None


@dataclass(frozen=True)
class Dropout:
    """Dropout of the adapters' input, decided by the row's key and never by its lane: one mask per example and site,
    the same for all of its tokens. ``keys``: one integer per row."""

    rate: float
    keys: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """What the adapted layers do in one pass.

    ``merged``: replaced base weights (out, in), for bases whose weight is known; see ``merged_weight``.
    """

    segments: tuple[Segment, ...]
    slots: Mapping[str, tuple[Factors, ...]] = field(default_factory=dict[str, tuple[Factors, ...]])
    dense: Mapping[str, tuple[Dense, ...]] = field(default_factory=dict[str, tuple[Dense, ...]])
    merged: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    dropout: Dropout | None = None

    @property
    def rows(self) -> int:
        return self.segments[-1][2]


class _LowRank(torch.autograd.Function):
    """y + scale_k B_k C_k A_k x per segment, as one node: saves x and the two small products, makes no copy of x."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        scale: tuple[float, ...],
        segments: tuple[Segment, ...],
    ) -> Tensor:
        kept = a.dtype  # float32 also where the base computes in bfloat16: gradients come back in it
        a, b, c = _cast(a, x), _cast(b, x), None if c is None else _cast(c, x)
        out = y.clone(memory_format=torch.contiguous_format)
        inner: list[Tensor] = []
        for lane, start, stop in segments:
            u = x[start:stop].flatten(0, -2) @ a[lane].T
            v = u if c is None else u @ c[lane].T
            into = out[start:stop].flatten(0, -2)
            if into.dtype == v.dtype:
                into.addmm_(v, b[lane].T, alpha=scale[lane])
            else:
                into.add_(v @ b[lane].T, alpha=scale[lane])
            inner.append(u)
        ctx.save_for_backward(x, a, b, c, *inner)
        ctx.scale, ctx.segments, ctx.kept = scale, segments, kept
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, a, b, c, *inner = ctx.saved_tensors
        need_x, need_a, need_b, need_c = ctx.needs_input_grad[1:5]
        grad = _cast(grads[0], x)
        gx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
        ga, gb = (torch.zeros_like(v, dtype=ctx.kept) if need else None for v, need in ((a, need_a), (b, need_b)))
        gc = torch.zeros_like(c, dtype=ctx.kept) if need_c else None
        for (lane, start, stop), u in zip(ctx.segments, inner):
            g, scale = grad[start:stop].flatten(0, -2), ctx.scale[lane]
            dv = (g @ b[lane]).mul_(scale)
            du = dv if c is None else dv @ c[lane]
            if gb is not None:
                gb[lane] = (g.T @ (u if c is None else u @ c[lane].T)).mul_(scale)
            if gc is not None:
                gc[lane] = dv.T @ u
            if ga is not None:
                ga[lane] = du.T @ x[start:stop].flatten(0, -2)
            if gx is not None:
                torch.mm(du, a[lane], out=gx[start:stop].flatten(0, -2))
        return grads[0], gx, ga, gb, gc, None, None


def _cast(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)


class LaneLinear(nn.Module):
    """Wraps a linear-like layer, which it only calls. Without a plan it is that layer.

    >>> import torch
    >>> layer = LaneLinear(torch.nn.Linear(5, 3), "site")
    >>> one = Factors(torch.ones(1, 2, 5), torch.ones(1, 3, 2), None, (0.5,))
    >>> x = torch.ones(4, 6, 5)
    >>> with applied([layer], Plan(((0, 0, 4),), {"site": (one,)})):
    ...     y = layer(x)
    >>> torch.allclose(y - layer(x), torch.full((4, 6, 3), 5.0))
    True
    """

    def __init__(self, base: nn.Module, site: str) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.out_features, self.in_features = sizes(base)
        self.plan: Plan | None = None
        self._stream = derive("dropout", site) >> 1

    @property
    def weight(self) -> Any:
        """The base's weight: some models ask for its type."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        plan = self.plan
        if plan is None:
            return self.base(x)
        merged = plan.merged.get(self.site)
        y: Tensor = self.base(x) if merged is None else functional.linear(x, merged, _bias(self.base))
        slots, dense = plan.slots.get(self.site, ()), plan.dense.get(self.site, ())
        if not slots and not dense:
            return y
        shape = y.shape
        rows = _rows(x, plan)
        y = y.reshape(*rows.shape[:-1], y.shape[-1])
        if plan.dropout is not None:
            rows = rows * _mask(plan.dropout, self._stream, self.in_features).to(rows.dtype).unsqueeze(1)
        for change in dense:
            delta = change.weight * functional.linear(rows, change.W.to(rows.dtype)).to(y.dtype)
            y = y + (delta if change.gate is None else change.gate[:, None, None].to(y.dtype) * delta)
        for slot in slots:
            if slot.gate is None:
                y = _lowrank(y, rows, slot, plan.segments)
            else:
                delta = _lowrank(torch.zeros_like(y), rows, slot, plan.segments)
                y = y + slot.gate[:, None, None].to(y.dtype) * delta
        return y.reshape(shape)


def _lowrank(y: Tensor, x: Tensor, slot: Factors, segments: tuple[Segment, ...]) -> Tensor:
    node: Any = _LowRank  # torch's autograd functions are untyped
    return node.apply(y, x, slot.A, slot.B, slot.C, slot.scale, segments)


def _rows(x: Tensor, plan: Plan) -> Tensor:
    """x as (rows, tokens, in): some layers see tokens of all rows in one dimension."""
    if x.shape[0] != plan.rows and x.shape[0] % plan.rows:
        raise ValueError(
            f"an adapted layer got {x.shape[0]} rows in a batch of {plan.rows} examples: layers that see a selection "
            "of tokens (mixture-of-experts routing) cannot be adapted"
        )
    return x.reshape(plan.rows, -1, x.shape[-1])


def _mask(dropout: Dropout, start: int, width: int) -> Tensor:
    """Bernoulli(1 - rate) / (1 - rate) of shape (rows, width), a hash of (row key, site, feature)."""
    prime = 0x9E3779B97F4A7C15 - 2**64
    column = torch.arange(width, device=dropout.keys.device) + start
    mixed = (dropout.keys[:, None] * prime) ^ (column[None] * 0x2545F4914F6CDD1D)
    for shift in (30, 27, 31):  # the finaliser of splitmix64, on signed integers
        mixed = (mixed ^ (mixed >> shift)) * prime
    uniform = (mixed >> 40 & 0xFFFFFF).double() / 0x1000000
    return (uniform >= dropout.rate) / (1 - dropout.rate)


@contextmanager
def applied(layers: list[LaneLinear], plan: Plan | None) -> Generator[None]:
    """The layers follow the plan inside the block."""
    try:
        for layer in layers:
            layer.plan = plan
        yield
    finally:
        for layer in layers:
            layer.plan = None


def sizes(base: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear-like layer: nn.Linear and quantised linears by their attributes, GPT-2's Conv1D by its own.

    >>> sizes(torch.nn.Linear(5, 3))
    (3, 5)
    """
    for out, inner in (("out_features", "in_features"), ("nf", "nx")):
        if hasattr(base, out) and hasattr(base, inner):
            return int(getattr(base, out)), int(getattr(base, inner))
    raise TypeError(f"{type(base).__name__} is not linear-like: it names no in_features and out_features")


def mergeable(base: nn.Module) -> bool:
    """Whether the base's weight is known well enough to be replaced: exactly nn.Linear or GPT-2's Conv1D."""
    return type(base) is nn.Linear or _transposed(base)


def merged_weight(base: nn.Module, change: Tensor) -> Tensor:
    """W0 + change, (out, in), added in the change's type and stored in W0's."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    weight = weight.detach().T if _transposed(base) else weight.detach()
    wide = torch.promote_types(weight.dtype, change.dtype)
    return (weight.to(wide) + change.to(weight.device, wide)).to(weight.dtype).contiguous()


def _transposed(base: nn.Module) -> bool:
    return type(base).__name__ == "Conv1D" and hasattr(base, "nx")


def _bias(base: nn.Module) -> Tensor | None:
    return getattr(base, "bias", None)
