"""Frozen linear layers whose weights lie as the processor's matrix units read them.

    y = x W^T + b        forwards by a copy of W that is reordered once; backwards by W itself

oneDNN reorders a weight of bfloat16 in every product, and torch writes the bias out before it. Prepacked layers do
neither, for their weights' memory a second time.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedlora.adapters.lora import frozen
from fedlora.adapters.subspace import halves_are_fast

ROWS = 2048
"""Tokens of the product that the order is chosen for; it serves any number."""
mkldnn: Any = torch.ops.mkldnn


@dataclass(frozen=True, eq=False)
class Prepacked:
    """A layer's forward. ``source``: the weight that ``packed`` holds in another order, and ``version`` its state then:
    where the layer has another weight by now, or one that trains, the layer computes as ever.

    >>> layer = nn.Linear(6, 4).bfloat16().requires_grad_(False)
    >>> x = torch.randn(5, 6).bfloat16()
    >>> bool(torch.allclose(prepack(layer)(x), layer(x), atol=1e-2))
    True
    """

    layer: nn.Linear
    source: Tensor
    version: int
    packed: Tensor

    def __call__(self, input: Tensor) -> Tensor:
        weight = self.layer.weight
        same = weight.data_ptr() == self.source.data_ptr() and weight._version == self.version
        if not same or not frozen(self.layer) or input.dtype != torch.bfloat16:
            return functional.linear(input, weight, self.layer.bias)
        node: Any = _Product
        return node.apply(input, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Prepacked) -> Tensor:
        ctx.weight = layer.source
        return mkldnn._linear_pointwise(x, layer.packed, layer.layer.bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0] @ ctx.weight, None


def prepack(layer: nn.Linear) -> Prepacked:
    """A layer of bfloat16 with its weight reordered."""
    source = layer.weight.detach()
    return Prepacked(layer, source, layer.weight._version, mkldnn._reorder_linear_weight(source, ROWS))


def prepacks(module: nn.Module) -> list[Prepacked]:
    """All frozen linear layers of a model, where the processor gains by it: in bfloat16, on a CPU that has it."""
    return [prepack(m) for m in module.modules() if type(m) is nn.Linear and _gains(m)]


def _gains(layer: nn.Linear) -> bool:
    kind = layer.weight.dtype == torch.bfloat16 and layer.weight.device.type == "cpu" and frozen(layer)
    return kind and halves_are_fast() and torch.backends.mkldnn.is_available()


@contextmanager
def using(layers: Sequence[Prepacked]) -> Generator[None]:
    """The layers compute so inside the block."""
    with ExitStack() as stack:
        for one in layers:
            if "forward" not in vars(one.layer):
                one.layer.forward = one
                stack.callback(vars(one.layer).pop, "forward")
        yield
