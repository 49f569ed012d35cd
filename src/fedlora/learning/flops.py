"""Floating-point operations of passes over models, by client: a few passes of a kind are counted, the rest follow."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

KNOTS = 3
"""Lengths at which a kind of pass is counted; between and beyond them the count is a parabola through these."""
untyped: Any = flop_counter
aten: Any = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> int:
    return untyped.sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> int:
    return untyped.sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FORMULAS: Mapping[Any, Any] = {
    **untyped.flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # which torch's own counter leaves out
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Counter(TorchDispatchMode):
    """Adds up torch's formulas over the operations inside the block. Unlike torch's own ``FlopCounterMode`` it takes no
    operation apart: what is computed stays the same, bit for bit."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def parabola(points: Mapping[int, float], x: int) -> float:
    """The value at ``x`` of the polynomial through the points (Lagrange).

    >>> parabola({1: 1.0, 2: 4.0, 4: 16.0}, 10)
    100.0
    """
    total = 0.0
    for one, value in points.items():
        for other in points:
            if other != one:
                value *= (x - other) / (one - other)
        total += value
    return total


class Meter:
    """Counts matrix products and convolutions, forwards and backwards (elementwise work and optimisers are not).

    A pass costs the sum over its rows of a function of the padded length alone, quadratic at most: linear layers grow
    with the tokens, attention with their square. So the counter, which slows a pass down, looks at each kind of
    pass (model, what is trained) at ``KNOTS`` lengths only. ``clients``: the operations so far by client.
    """

    def __init__(self) -> None:
        self.clients: dict[str, float] = {}
        self.known: dict[Hashable, dict[tuple[int, ...], float]] = {}
        self.kinds: dict[Hashable, int] = {}

    @property
    def total(self) -> float:
        """All operations so far."""
        return sum(self.clients.values())

    def kind(self, value: Hashable) -> int:
        """A short name for a kind of pass."""
        return self.kinds.setdefault(value, len(self.kinds))

    @contextmanager
    def watch(self, kind: Hashable, lengths: tuple[int, ...], rows: Iterable[tuple[str, int]]) -> Generator[None]:
        """Books the pass inside the block. ``lengths``: the padded length of each model's input; ``rows``: how many
        rows are whose."""
        shares = list(rows)
        cost = self.cost(kind, lengths)
        if cost is not None:
            yield
        else:
            with Counter() as counter:
                yield
            cost = counter.total / max(1, sum(count for _, count in shares))
            self.known.setdefault(kind, {})[lengths] = cost
        for client, count in shares:
            self.clients[client] = self.clients.get(client, 0.0) + cost * count

    def cost(self, kind: Hashable, lengths: tuple[int, ...]) -> float | None:
        """Operations of one row, or None where a pass must be counted first."""
        known = self.known.get(kind, {})
        if lengths in known or len(set(lengths)) > 1:  # models that read differently: every pair of lengths is its own
            return known.get(lengths)
        points = {key[0]: cost for key, cost in known.items() if len(set(key)) == 1}
        return parabola(points, lengths[0]) if len(points) >= KNOTS else None
