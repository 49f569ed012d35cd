"""FedDPA: a local adapter beside the global one, weighted per example (arXiv 2403.19211)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedlora.adapters.algebra import adapter, add, difference, shapes, whole
from fedlora.algorithms.merging import equal_ranks, start, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, NotNegative, Update, Whole
from fedlora.federation.orders import Features, Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree, derive, stream

Memory = Mapping[str, Any]


@dataclass(frozen=True)
class FedDPA(Algorithm[Tree, Memory, Tree]):
    """Dual adapters: the global one is averaged, a local one is trained with the global one frozen beside it.

        theta <- theta + sum_i p_i (theta_i - theta),   p_i = n_i / sum n over the round
        local_i <- training of W0 + theta_i + local_i   with theta_i frozen
        inference:  h = W0 x + w(x) local_i x + (1 - w(x)) theta x,
                    w(x) = clip(scale * mean_k cos(f0(x), f0(x_k)), 0, 1),   f0 the unadapted base, x_k drawn own ones

    The local head starts as the one just trained with theta; who never trained has theta's head. Deployed: "gated";
    variants "sum" (both at weight 1, as trained) and "global". Equal ranks.

    Travels: A, B and shared extras of the global adapter, both ways. Stays: the local adapter and its head, the
    reference features, private extras. Paper: arXiv 2403.19211.

    >>> import torch
    >>> gate = Nearness(scale=1.0)
    >>> gate(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), {"extra/reference": torch.tensor([[3.0, 0.0]])})
    tensor([[1., 0.],
            [0., 1.]])
    """

    given_start = False

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)
    scale: NotNegative = 1.0
    references: Whole = 5

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        return start(spec, seed, self.extras)

    def client_init(self, local: Local) -> Work[tuple[None, Memory]]:
        features, _ = yield from Features(Model({}), "train")
        own = local.spec.adapter(local.client.ranks, derive(local.run_seed, "local"))
        luck = stream(local.run_seed, "references", local.client.id)  # rows may be sorted by class
        drawn = torch.randperm(len(features), generator=luck)[: self.references].sort().values
        return None, {"own": own, "reference": features[drawn], "private": {}}

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        equal_ranks(state, client, "feddpa")
        return state

    def client_update(self, payload: Tree, memory: Memory, local: Local) -> Work[tuple[Update, Memory]]:
        train = trained(local.spec, self.extras, "A", "B")
        tuned = yield from self.training.fit(local, Model({**payload, **memory["private"]}), train)
        both = Model({**whole(tuned.params), **memory["own"]}, others=(adapter(tuned.params),))
        own = yield from self.training.fit(local, both, train)
        kept = {**memory, "own": own.params, "private": self.extras.staying(tuned.params)}
        return Update(difference(tuned.params, payload), local.examples, tuned.sums), kept

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(difference(state, state))

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def server_model(self, state: Tree) -> Model | None:
        return None if self.extras.personal else Model(state)

    def personalize(self, payload: Tree, memory: Memory, local: Local) -> Work[Mapping[str, Model]]:
        shared, other = {**payload, **memory["private"]}, (adapter(payload),)
        own = {**whole(shared), **memory["own"]}
        return {
            "gated": Model({**own, "extra/reference": memory["reference"]}, other, Nearness(self.scale)),
            "sum": Model(own, other),
            "global": Model(shared),
        }
        yield


@dataclass(frozen=True)
class Nearness:
    """The gate: (examples, 2), how much the local and the global adapter count.

    Its reference examples are in ``params``, so that an export is data and a name.
    """

    scale: float

    def __call__(self, features: Tensor, params: Tree) -> Tensor:
        cosine = normalize(features, dim=-1) @ normalize(params["extra/reference"], dim=-1).T
        mean = cosine.sum(-1) / max(1, cosine.shape[-1])  # a client without training examples has no reference
        near = (self.scale * mean).clamp(0, 1)
        return torch.stack([near, 1 - near], -1)
