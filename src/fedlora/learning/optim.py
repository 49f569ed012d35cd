"""Which parameters a selector means, the batches of a fit, and torch's optimisers on flat rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedlora.federation.orders import Fit, Optimizer

Block = tuple[str, int, int]
"""(tree key, first, one past the last number) in a lane's flat row."""


def selects(selector: str, key: str) -> bool:
    """Whether a selector means a tree's entry: a factor at the sites, or a prefix.

    >>> [selects("A", k) for k in ("x.query/A", "extra/A", "head/weight")], selects("head", "head/weight")
    ([True, False, False], True)
    """
    if selector in ("A", "B", "C", "W"):
        return key.endswith(f"/{selector}") and not key.startswith("extra/")
    return key == selector or key.startswith(f"{selector}/")


@lru_cache(maxsize=256)  # every job of every client asks for the same names
def chosen(selectors: tuple[str, ...], keys: tuple[str, ...]) -> tuple[str, ...]:
    """The trained keys. A selector that means nothing is an error."""
    for selector in selectors:
        if not any(selects(selector, key) for key in keys):
            raise KeyError(f"the selector {selector!r} selects nothing of {sorted(keys)}")
    return tuple(key for key in keys if any(selects(selector, key) for selector in selectors))


def plan(count: int, order: Fit, generator: torch.Generator) -> list[Tensor]:
    """The batches of a fit, as positions in the split: whole epochs, each shuffled anew, the last partial batch kept;
    or exactly ``steps`` of them."""
    if (order.epochs is None) == (order.steps is None):
        raise ValueError("a Fit has either epochs or steps")
    if not count:
        return []
    wanted = order.steps if order.steps is not None else (order.epochs or 0) * math.ceil(count / order.batch_size)
    batches: list[Tensor] = []
    while len(batches) < wanted:
        batches += torch.split(torch.randperm(count, generator=generator), order.batch_size)
    return batches[:wanted]


def groups(optimizer: Optimizer, blocks: Sequence[Block]) -> list[tuple[int, int, float, float]]:
    """(first, last, lr, weight decay) of a flat row; neighbours that agree are one."""
    out: list[tuple[int, int, float, float]] = []
    for key, start, stop in blocks:
        lr = next((rate for selector, rate in optimizer.lrs if selects(selector, key)), optimizer.lr)
        decay = 0.0 if any(selects(selector, key) for selector in optimizer.no_decay) else optimizer.weight_decay
        if out and out[-1][1:] == (start, lr, decay):
            out[-1] = (out[-1][0], stop, lr, decay)
        else:
            out.append((start, stop, lr, decay))
    return out


class Stepper:
    """A torch optimiser on slices of the rows of all lanes, (lanes, P), each with moments of its own: it computes what
    separate ones would on the separate parameters, since its formulas are elementwise. It updates ``values`` in place.
    """

    def __init__(self, optimizer: Optimizer, blocks: Sequence[Block], values: Tensor, grads: Tensor) -> None:
        self.parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in values]  # by lane: (numbers, their gradients)
        parameters: list[dict[str, Any]] = []
        for start, stop, lr, decay in groups(optimizer, blocks):
            leaves = [row[start:stop].detach().requires_grad_() for row in values]
            for lane, (leaf, row) in enumerate(zip(leaves, grads)):
                self.parts[lane].append((leaf, row[start:stop]))
            parameters.append({"params": leaves, "lr": lr, "weight_decay": decay})
        self.inner: torch.optim.Optimizer
        if optimizer.name == "adamw":
            self.inner = torch.optim.AdamW(parameters, lr=optimizer.lr, fused=True)
        else:
            self.inner = torch.optim.SGD(parameters, lr=optimizer.lr, momentum=optimizer.momentum)

    def forget(self, lane: int) -> None:
        """Drops a lane's moments and count of steps."""
        for leaf, _ in self.parts[lane]:
            self.inner.state.pop(leaf, None)

    def step(self, lanes: Collection[int]) -> None:
        """One step in these lanes; the others stay as they are."""
        for lane, parts in enumerate(self.parts):
            for leaf, grad in parts:
                leaf.grad = grad if lane in lanes else None
        self.inner.step()


def clip(grads: Tensor, norm: Tensor, largest: float) -> None:
    """Scales a lane's whole gradient row to at most the given norm, as ``clip_grad_norm_`` does."""
    grads.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
