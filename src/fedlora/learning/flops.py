"""Floating-point operations of passes over models, by client: a few passes of a kind are counted, the rest follow."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

CLOSE = 1e-9
"""Relative error within which sizes are a sum of others."""
Array = np.ndarray[Any, Any]
untyped: Any = flop_counter
aten: Any = torch.ops.aten
mkldnn: Any = torch.ops.mkldnn


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> int:
    return untyped.sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> int:
    return untyped.sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _prepacked(x: Tensor, *rest: Any, out_val: Tensor, **named: Any) -> int:
    return 2 * x.numel() * out_val.shape[-1]


def _grouped(x: Tensor, weights: Tensor, *rest: Any, **named: Any) -> int:
    """Experts' products: groups of the rows (or, for weights' gradients, of the inner size) by a matrix each."""
    both = x.shape[0] if x.dim() == weights.dim() == 3 else 1
    return 2 * both * x.shape[-2] * x.shape[-1] * weights.shape[-1]


OWN: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # which torch's own counter leaves out
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **({aten._grouped_mm: _grouped} if hasattr(aten, "_grouped_mm") else {}),
    **({mkldnn._linear_pointwise: _prepacked} if hasattr(mkldnn, "_linear_pointwise") else {}),
}
FORMULAS: Mapping[Any, Any] = ChainMap(OWN, untyped.flop_registry)
"""Ours first; torch's grow as its modules are imported."""


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


def combination(known: Array, wanted: Array) -> Array | None:
    """The weights with which the rows of ``known`` sum to ``wanted``, None where no weights do.

    >>> combination(np.array([[1.0, 2.0, 4.0], [1.0, 3.0, 9.0]]), np.array([2.0, 5.0, 13.0])).round(6)
    array([1., 1.])
    >>> combination(np.array([[1.0, 2.0, 4.0]]), np.array([1.0, 3.0, 9.0]))
    """
    scale = np.maximum(np.abs(wanted), np.abs(known).max(0, initial=0)) + 1e-300
    weights = np.linalg.lstsq((known / scale).T, wanted / scale, rcond=1e-10)[0]
    return weights if np.abs(known.T @ weights - wanted).max(initial=0) <= CLOSE * np.abs(wanted).max() else None


class Meter:
    """Counts matrix products and convolutions, forwards and backwards (elementwise work and optimisers are not).

    A pass of a kind (model, what is trained) costs a sum over its rows, tokens and scores (queries x keys), each with a
    coefficient of the kind. So the counter, which slows a pass down, looks only at passes whose ``sizes`` are no sum of
    those that were counted: as many as there are sizes. ``clients``: the operations so far by client.
    """

    def __init__(self) -> None:
        self.clients: dict[str, float] = {}
        self.known: dict[Hashable, list[tuple[Array, float]]] = {}
        self.kinds: dict[Hashable, int] = {}

    @property
    def total(self) -> float:
        """All operations so far."""
        return sum(self.clients.values())

    def kind(self, value: Hashable) -> int:
        """A short name for a kind of pass."""
        return self.kinds.setdefault(value, len(self.kinds))

    @contextmanager
    def watch(self, kind: Hashable, sizes: Sequence[float], shares: Sequence[tuple[str, int]]) -> Generator[None]:
        """Books the pass inside the block. ``sizes``: what it costs a linear function of; ``shares``: how much of it is
        whose, in any unit."""
        size = np.array(sizes, dtype=np.float64)
        cost = self.cost(kind, size)
        if cost is not None:
            yield
        else:
            with Counter() as counter:
                yield
            cost = float(counter.total)
            self.known.setdefault(kind, []).append((size, cost))
        left, whole = int(cost), sum(part for _, part in shares)
        for client, part in shares:  # whole operations, so that no order of adding matters
            own = left * part // whole if whole else 0
            self.clients[client] = self.clients.get(client, 0.0) + own
            left, whole = left - own, whole - part

    def cost(self, kind: Hashable, sizes: Array) -> float | None:
        """Operations of a pass, or None where it must be counted."""
        known = self.known.get(kind, [])
        if not known:
            return None
        weights = combination(np.array([size for size, _ in known]), sizes)
        if weights is None:
            return None
        return float(round(float(weights @ np.array([cost for _, cost in known]))))  # whole, whichever were counted
