"""The adapted layer: any linear-like base, and on it the low-rank adapters of many models ("lanes") in one pass.

    row x of lane k:   h = W0 x (+ shared change) + sum over slots of  weight_k * scale_k * B_k C_k A_k x

The rows of a batch are sorted by lane, so that each lane's rows are one contiguous segment: its factors meet its own
rows only (or, where all numbers are finite, foreign rows times zero). A non-finite number in one lane therefore never
reaches another. Ranks are zero-padded to the stack's; the
padding of A, B and C receives a gradient of exactly zero.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedlora.errors import UserError
from fedlora.federation.spec import derive

Segment = tuple[int, int, int]
"""(lane, first row, one past the last row)."""
WIDE = 512
"""The most lanes * rank of one product for all lanes: beyond, its zeros cost more than the calls that it saves."""


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

    ``merged``: replaced base weights (out, in), for bases whose weight is known; see ``merged_weight``; ``owners``:
    for passes in which all lanes' factors meet all rows in one product, by rank (rows, lanes * rank), 1 where a row is
    the lane's; None where each meets its own segment.
    """

    segments: tuple[Segment, ...]
    slots: Mapping[str, tuple[Factors, ...]] = field(default_factory=dict[str, tuple[Factors, ...]])
    dense: Mapping[str, tuple[Dense, ...]] = field(default_factory=dict[str, tuple[Dense, ...]])
    merged: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    dropout: Dropout | None = None
    owners: Mapping[int, Tensor] | None = None

    @property
    def rows(self) -> int:
        return self.segments[-1][2]

    def together(self, dtype: torch.dtype, device: torch.device) -> Plan:
        """The same plan with ``owners``. All factors must be finite, and whoever differentiates must look whether
        the gradients are: 0 * inf is not a number."""
        sizes = {slot.A.shape[:2] for slots in self.slots.values() for slot in slots}
        owners: dict[int, Tensor] = {}
        for lanes, rank in sizes:
            found = torch.zeros(self.rows, lanes * rank, dtype=dtype, device=device)
            for lane, start, stop in self.segments:
                found[start:stop, lane * rank : (lane + 1) * rank] = 1
            owners[rank] = found
        return replace(self, owners=owners)


class _LowRank(torch.autograd.Function):
    """y + scale_k B_k C_k A_k x per segment, as one node: saves x and the two small products, makes no copy of x.

    ``y``: what the base says of x, or the base itself, frozen: then its products are part of the node.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | nn.Linear,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        scale: tuple[float, ...],
        segments: tuple[Segment, ...],
    ) -> Tensor:
        kept = a.dtype  # float32 also where the base computes in bfloat16: gradients come back in it
        a, b, c = _cast(a, x), _cast(b, x), None if c is None else _cast(c, x)
        out = _said(y, x)
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
        ctx.scale, ctx.segments, ctx.kept, ctx.weight = scale, segments, kept, _held(y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, a, b, c, *inner = ctx.saved_tensors
        need_x, need_a, need_b, need_c = ctx.needs_input_grad[1:5]
        grad = _cast(grads[0], x)
        gx = _through(ctx.weight, grad, x) if need_x else None
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
                gx[start:stop].flatten(0, -2).addmm_(du, a[lane], beta=0 if ctx.weight is None else 1)
        return grads[0] if ctx.weight is None else None, gx, ga, gb, gc, None, None


class _LowRankTogether(torch.autograd.Function):
    """The same of all lanes by two products: the lanes' factors side by side, (lanes * r), and in between what meets
    other lanes' rows is zero.

    Where products are fast and calls are dear (bfloat16 on matrix units) many small products cost more than a few
    large ones, mostly of zeros. But 0 * inf is not a number: only for factors and gradients that are finite.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor | nn.Linear, x: Tensor, a: Tensor, b: Tensor, c: Tensor | None, scale: Tensor, owner: Tensor
    ) -> Tensor:
        kept = a.dtype
        a, b = _cast(a, x).flatten(0, 1), _cast(b * scale[:, None, None], x).transpose(1, 2).flatten(0, 1)
        c = None if c is None else _cast(_diagonal(c), x)
        rows = x.flatten(0, -2)
        u = _own(rows @ a.T, owner)
        v = u if c is None else u @ c.T
        out = _said(y, x)
        out.flatten(0, -2).addmm_(v, b)
        ctx.save_for_backward(x, a, b, c, u, scale, owner)
        ctx.kept, ctx.weight = kept, _held(y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, a, b, c, u, scale, owner = ctx.saved_tensors
        need_x, need_a, need_b, need_c = ctx.needs_input_grad[1:5]
        lanes = len(scale)
        rows, g = x.flatten(0, -2), _cast(grads[0], x).flatten(0, -2)
        dv = _own(g @ b.T, owner)
        du = dv if c is None else dv @ c
        ga = gb = gc = None
        if need_a:
            ga = (du.T @ rows).to(ctx.kept).unflatten(0, (lanes, -1))
        if need_b:
            v = u if c is None else u @ c.T
            gb = (v.T @ g).to(ctx.kept).unflatten(0, (lanes, -1)).transpose(1, 2) * scale[:, None, None]
        if need_c:
            every = (dv.T @ u).to(ctx.kept).unflatten(1, (lanes, -1)).unflatten(0, (lanes, -1))
            gc = every.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        gx = _through(ctx.weight, g.view_as(grads[0]), x) if need_x else None
        if gx is not None:
            gx.flatten(0, -2).addmm_(du, a, beta=0 if ctx.weight is None else 1)
        return grads[0] if ctx.weight is None else None, gx, ga, gb, gc, None, None


def _said(y: Tensor | nn.Linear, x: Tensor) -> Tensor:
    """What the base says of x, to be added to."""
    if isinstance(y, nn.Linear):
        return y(x)
    return y.clone(memory_format=torch.contiguous_format)


def _held(y: Tensor | nn.Linear) -> Tensor | None:
    """The base's weight as it is in this pass: it may be replaced for it alone."""
    return y.weight.detach() if isinstance(y, nn.Linear) else None


def _through(weight: Tensor | None, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x through the base, to be added to; only its room where the base is not in the node."""
    if weight is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad @ weight


def _diagonal(c: Tensor) -> Tensor:
    """(lanes, r, r) -> (lanes * r, lanes * r), zero outside the blocks."""
    lanes, rank = c.shape[:2]
    out = c.new_zeros(lanes, rank, lanes, rank)
    out.diagonal(dim1=0, dim2=2).copy_(c.permute(1, 2, 0))
    return out.view(lanes * rank, lanes * rank)


def _own(values: Tensor, owner: Tensor) -> Tensor:
    """(tokens, lanes * r): zero where a token is not the lane's. ``owner`` (rows, lanes * r): equal tokens each."""
    return (values.view(len(owner), -1, values.shape[1]) * owner[:, None]).view_as(values)


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
        slots, dense = plan.slots.get(self.site, ()), plan.dense.get(self.site, ())
        if merged is None and not dense and plan.dropout is None and (base := self._frozen(slots)) is not None:
            rows = _rows(x, plan, self.site)
            return _lowrank(base, rows, slots[0], plan).reshape(*x.shape[:-1], self.out_features)
        y: Tensor = self.base(x) if merged is None else functional.linear(x, merged, _bias(self.base))
        if not slots and not dense:
            return y
        shape = y.shape
        rows = _rows(x, plan, self.site)
        y = y.reshape(*rows.shape[:-1], y.shape[-1])
        if plan.dropout is not None:
            rows = rows * _mask(plan.dropout, self._stream, self.in_features).to(rows.dtype).unsqueeze(1)
        for change in dense:
            delta = change.weight * functional.linear(rows, change.W.to(rows.dtype)).to(y.dtype)
            y = y + (delta if change.gate is None else change.gate[:, None, None].to(y.dtype) * delta)
        for slot in slots:
            if slot.gate is None:
                y = _lowrank(y, rows, slot, plan)
            else:
                delta = _lowrank(torch.zeros_like(y), rows, slot, plan)
                y = y + slot.gate[:, None, None].to(y.dtype) * delta
        return y.reshape(shape)

    def _frozen(self, slots: tuple[Factors, ...]) -> nn.Linear | None:
        """The base, where it is a frozen nn.Linear under one adapter for all rows."""
        base = self.base
        if type(base) is not nn.Linear or len(slots) != 1 or slots[0].gate is not None:
            return None
        return base if frozen(base) else None


def _lowrank(y: Tensor | nn.Linear, x: Tensor, slot: Factors, plan: Plan) -> Tensor:
    node: Any = _LowRank  # torch's autograd functions are untyped
    lanes, rank = slot.A.shape[:2]
    if plan.owners is None or lanes * rank > WIDE:
        return node.apply(y, x, slot.A, slot.B, slot.C, slot.scale, plan.segments)
    node = _LowRankTogether
    scale = torch.tensor(slot.scale, dtype=slot.A.dtype, device=x.device)
    return node.apply(y, x, slot.A, slot.B, slot.C, scale, plan.owners[rank])


def _rows(x: Tensor, plan: Plan, site: str) -> Tensor:
    """x as (rows, tokens, in): some layers see tokens of all rows in one dimension."""
    if x.shape[0] != plan.rows and x.shape[0] % plan.rows:
        got, what = f"{x.shape[0]} rows", "a selection of tokens (mixture-of-experts routing)"
        if x.shape[0] == 1:
            got, what = "1 row", "a table of positions, which is no example's,"
        raise UserError(
            f"the adapted layer {site!r} got {got} in a batch of {plan.rows} examples: layers that see {what} "
            "cannot be adapted",
            "name other layers in [adapter] targets, for example those of the attention",
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


def frozen(base: nn.Linear) -> bool:
    """Whether a linear layer does not train."""
    return not any(value.requires_grad for value in (base.weight, _bias(base)) if value is not None)


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
