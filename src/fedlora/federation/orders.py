"""What a client program may ask for: models, and the three orders Fit, Score and Features."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from torch import Tensor
from torch.nn import functional

from fedlora.federation.spec import Local, Sums, Tree

T = TypeVar("T")
Split = Literal["train", "fit", "holdout", "validation", "test"]
"""train = fit + holdout, both the algorithm's own; "validation" (to choose hyper-parameters and rounds by) and "test"
are refused to algorithm code."""
Work = Generator[Any, Any, T]
"""A client program: yields an order or a tuple of independent orders, returns a T."""


@dataclass(frozen=True, eq=False)
class Batch:
    """``labels``: class indices (examples,) or token ids (examples, tokens) with -100 where nothing is predicted."""

    inputs: Any
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Outputs:
    """What one model says of one batch.

    ``logits`` (examples, classes) or (examples, tokens, vocabulary), aligned with the labels; ``features``
    (examples, width), the pooled representation.
    """

    logits: Tensor
    features: Tensor


# All three: a module-level function, or a frozen dataclass with __call__ where there is a hyper-parameter. Never a
# closure or functools.partial: equal ones must compare equal (lanes fuse what is equal) and be nameable in an export.
Predict = Callable[[Outputs, Tree], Tensor]
Gate = Callable[[Tensor, Tree], Tensor]
"""(pooled features of the unadapted backbone, params) -> (examples, 1 + len(others))."""
Objective = Callable[[Mapping[str, Outputs], Mapping[str, Tree], Batch], Tensor]
"""Outputs and params keyed by model name; one loss per example."""


FORBIDDEN = -1e9
"""The logit of a label that is not the client's, where label spaces are own: finite, so that distillation's 0 * log 0
stays 0."""


def allowed(scores: Tensor, outputs: Outputs) -> Tensor:
    """Scores of one's own, (examples, classes), forbidden where the model's logits are.

    >>> import torch
    >>> allowed(torch.ones(1, 2), Outputs(torch.tensor([[0.5, FORBIDDEN]]), torch.zeros(1, 3)))
    tensor([[ 1.0000e+00, -1.0000e+09]])
    """
    return scores.masked_fill(outputs.logits <= FORBIDDEN / 2, FORBIDDEN)


def logits(outputs: Outputs, params: Tree) -> Tensor:
    """The plain prediction."""
    return outputs.logits


def label_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per example; over tokens, the mean over an example's labelled ones.

    >>> import torch
    >>> label_loss(torch.zeros(2, 3, 4), torch.tensor([[0, 1, -100], [2, -100, -100]]))
    tensor([1.3863, 1.3863])
    """
    if scores.dim() == 2:
        return functional.cross_entropy(scores, labels, reduction="none")
    losses = functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return losses.view_as(labels).sum(-1) / (labels != -100).sum(-1).clamp_min(1)


def cross_entropy(outputs: Mapping[str, Outputs], params: Mapping[str, Tree], batch: Batch) -> Tensor:
    """The plain objective of the single model."""
    return label_loss(outputs["model"].logits, batch.labels)


@dataclass(frozen=True, eq=False)
class Model:
    """A base plus what is put on it: h = W0 x + sum_k weights_k s_k B_k C_k A_k x (+ shared changes of W0).

    What ``params`` does not name keeps the backbone's own value (for heads: the seeded start). ``others``: further
    adapters at the same sites, frozen. ``weights`` of (params, *others): constants, or a gate per example; None: all 1.
    ``shared``: changes of the base, factored or dense, summed in order; held by reference, so that an engine merges
    them once for all clients of a round.
    """

    params: Tree
    others: tuple[Tree, ...] = ()
    weights: tuple[float, ...] | Gate | None = None
    shared: tuple[Tree, ...] = ()
    backbone: str = "base"
    predict: Predict = logits

    def plain(self) -> dict[str, Any]:
        """The model as plain values (a server's model travels to those who score it): data only, no code."""
        if callable(self.weights) or self.predict is not logits:
            raise ValueError("a model with a gate or its own predict cannot travel: build it in personalize")
        return {
            "params": self.params,
            "others": list(self.others),
            "shared": list(self.shared),
            "backbone": self.backbone,
            "weights": None if self.weights is None else list(self.weights),
        }

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> Model:
        """The inverse of ``plain``."""
        weights = value["weights"]
        return cls(
            value["params"],
            tuple(value["others"]),
            None if weights is None else tuple(weights),
            tuple(value["shared"]),
            value["backbone"],
        )


@dataclass(frozen=True)
class Optimizer:
    """A local optimiser, fresh for every Fit. ``lrs``: (selector, lr) pairs that win over ``lr``; ``clip``: the largest
    norm of a client's whole gradient (None: unclipped)."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    lrs: tuple[tuple[str, float], ...] = ()
    no_decay: tuple[str, ...] = ()
    clip: float | None = None

    def scaled(self, factor: float) -> Optimizer:
        """Every learning rate times ``factor``."""
        return replace(self, lr=self.lr * factor, lrs=tuple((s, rate * factor) for s, rate in self.lrs))


@dataclass(frozen=True, eq=False)
class Proximal:
    """Adds ``strength / 2 * |params - anchor|^2`` over the anchor's names (FedProx, Ditto)."""

    strength: float
    anchor: Tree


@dataclass(frozen=True, eq=False)
class Tuned:
    """What a Fit gives back: the params given, with the trained names replaced (or added, where the backbone's own
    values were the start). ``sums["train_loss"]`` is (total, examples)."""

    models: Mapping[str, dict[str, Tensor]]
    sums: Sums
    steps: int

    @property
    def params(self) -> dict[str, Tensor]:
        """The single model's parameters."""
        return self.models["model"]


@dataclass(frozen=True, eq=False)
class Fit:
    """Train the selected parameters on a split.

    ``train`` holds selectors: ``A``, ``B``, ``C`` (factors at the sites), ``W`` (dense changes), or a prefix (``head``,
    ``norm``, ``embedding``, ``backbone``, ``extra``); with several models, one tuple per model. Either ``epochs``
    (whole passes) or ``steps``.
    """

    models: Model | Mapping[str, Model]
    train: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 16
    optimizer: Optimizer = field(default_factory=Optimizer)
    objective: Objective = cross_entropy
    proximal: Proximal | None = None
    split: Split = "train"

    def __iter__(self) -> Generator[Fit, Tuned, Tuned]:
        return (yield self)  # so that `tuned = yield from Fit(...)` is typed


@dataclass(frozen=True, eq=False)
class Score:
    """The task's sums (loss, accuracy, bits per byte, ...) of a model on a split, at most ``limit`` examples."""

    model: Model
    split: Split
    limit: int | None = None

    def __iter__(self) -> Generator[Score, Sums, Sums]:
        return (yield self)


@dataclass(frozen=True, eq=False)
class Features:
    """(features, labels) of a split: (examples, width), (examples,)."""

    model: Model
    split: Split = "train"

    def __iter__(self) -> Generator[Features, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (yield self)


Order = Fit | Score | Features


def scores(*orders: Score) -> Generator[tuple[Score, ...], tuple[Sums, ...], tuple[Sums, ...]]:
    """Independent orders that may run together."""
    return (yield orders)


@dataclass(frozen=True)
class Training:
    """Local training as a run configures it: how long, how large a batch, which optimiser, which schedule over rounds.

    A fresh head starts from noise and has no scale s: it wants a larger rate than the adapters, hence the default.

    >>> half = Training(optimizer=Optimizer(lr=0.1), schedule="linear").rate(round=6, rounds=10)
    >>> round(half, 3)
    0.5
    """

    epochs: int | None = 1
    steps: int | None = None
    batch_size: int = 16
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-3, lrs=(("head", 2e-2),)))
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def rate(self, round: int, rounds: int) -> float:
        """The factor on the learning rates in a round (1 at the first, towards 0 at the last)."""
        done = min(max(round - 1, 0) / max(rounds, 1), 1.0)
        table = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return table[self.schedule]

    def fit(
        self,
        local: Local,
        models: Model | Mapping[str, Model],
        train: tuple[str, ...] | Mapping[str, tuple[str, ...]],
        *,
        epochs: int | None = None,
        objective: Objective = cross_entropy,
        proximal: Proximal | None = None,
        split: Split = "train",
    ) -> Fit:
        """The order that trains as configured; ``epochs`` overrides the configured length."""
        own = epochs is not None
        return Fit(
            models,
            train,
            epochs if own else (None if self.steps is not None else self.epochs),
            None if own else self.steps,
            self.batch_size,
            self.optimizer.scaled(self.rate(local.round, local.rounds)),
            objective,
            proximal,
            split,
        )
