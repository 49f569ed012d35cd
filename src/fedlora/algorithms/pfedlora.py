"""pFedLoRA: private backbones, one small shared low-rank adapter (arXiv 2310.13283)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.adapters.algebra import add, difference, shapes
from fedlora.algorithms.merging import needs_labels
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Share, Update, Whole
from fedlora.federation.orders import Batch, Model, Optimizer, Outputs, Training, Work, label_loss
from fedlora.federation.spec import Client, Local, ModelSpec, Shape, Tree, stream


@dataclass(frozen=True)
class PFedLoRA(Algorithm[Tree, Tree, Tree]):
    """Every client owns its model; a low-rank adapter on the common representation is all that travels.

        h = f_k(x),   y_loc = head(h),   y_ad = B A h              A: (rank, width), B: (labels, rank), no bias
        phase 1: adapter frozen, train f_k and head on  mu CE(y_ad, y) + (1 - mu) CE(y_loc, y)
        phase 2: f_k and head frozen, train A, B on     CE(y_ad, y)
        server:  A <- A + sum_k p_k (A_k - A),  B likewise,   p_k = n_k / sum n over the round

    A ~ N(0, 1 / width), B = 0, the same for all. Deployed: "local" (y_loc); variant "mix" is (1 - mu) y_loc + mu y_ad.

    Travels: A and B, both ways. Stays: the whole private model with its head (``extras`` do not apply). Paper: arXiv
    2310.13283.

    >>> spec = ModelSpec({}, {}, {}, ("no", "yes"), width=5)
    >>> {name: tuple(value.shape) for name, value in PFedLoRA().server_init(spec, seed=0).items()}
    {'extra/A': (3, 5), 'extra/B': (2, 3)}
    """

    given_start = False
    private_backbones = True

    training: Training = field(default_factory=lambda: Training(optimizer=Optimizer("sgd", 0.01, 0.9, 1e-3)))
    rank: Whole = 3
    mu: Share = 0.3

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        needs_labels(spec, "pfedlora")
        draw = torch.randn(self.rank, spec.width, generator=stream(seed, "extra/A"), dtype=spec.dtype)
        return {
            "extra/A": draw / math.sqrt(spec.width),
            "extra/B": torch.zeros(len(spec.labels), self.rank, dtype=spec.dtype),
        }

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        whose, fit = local.client.backbone, self.training.fit
        model = Model({**memory, **payload}, backbone=whose)
        first = yield from fit(local, model, ("backbone", "head"), objective=Both(self.mu))
        second = yield from fit(local, Model(first.params, backbone=whose), ("extra",), objective=through_adapter)
        private = {key: value for key, value in second.params.items() if key not in payload}
        return Update(difference(second.params, payload), local.examples, first.sums), private

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(state)

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        params, whose = {**memory, **payload}, local.client.backbone
        return {"local": Model(params, backbone=whose), "mix": Model(params, backbone=whose, predict=Mix(self.mu))}
        yield


def adapted(outputs: Outputs, params: Tree) -> Tensor:
    """y_ad = B A h: (examples, labels)."""
    return outputs.features @ params["extra/A"].T @ params["extra/B"].T


def through_adapter(outputs: Mapping[str, Outputs], params: Mapping[str, Tree], batch: Batch) -> Tensor:
    """CE(y_ad, y)."""
    return label_loss(adapted(outputs["model"], params["model"]), batch.labels)


@dataclass(frozen=True)
class Both:
    """mu CE(y_ad, y) + (1 - mu) CE(y_loc, y)."""

    mu: float

    def __call__(self, outputs: Mapping[str, Outputs], params: Mapping[str, Tree], batch: Batch) -> Tensor:
        alone = label_loss(outputs["model"].logits, batch.labels)
        return self.mu * through_adapter(outputs, params, batch) + (1 - self.mu) * alone


@dataclass(frozen=True)
class Mix:
    """(1 - mu) y_loc + mu y_ad."""

    mu: float

    def __call__(self, outputs: Outputs, params: Tree) -> Tensor:
        return (1 - self.mu) * outputs.logits + self.mu * adapted(outputs, params)
