"""FedAMP: every client's own mixture of models, clients that are near each other nearer still (arXiv 2007.03797)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.algebra import difference, mixture, shapes
from fedlora.algorithms.merging import Unsuitable, equal_ranks, start, trained
from fedlora.federation.aggregate import Collect
from fedlora.federation.algorithm import Algorithm, Kind, NotNegative, Positive, Share, Update
from fedlora.federation.orders import Model, Proximal, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree

State = Mapping[str, Any]


@dataclass(frozen=True)
class FedAMP(Algorithm[State, Tree, Mapping[str, Any]]):
    """No global model: the server keeps one cloud model a client, an attentive mixture of everybody's last model.

        u_i  = sum_j xi_ij w_j,    xi_ij = step / N exp(-|w_i - w_j|^2 / s)  for j != i,    xi_ii = 1 - the others
        w_i <- local training from u_i of  f_i(w) + proximal / 2 |w - u_i|^2

    w is all that travels, A, B and shared extras, one long vector; N clients have been heard. The paper's
    xi is ``alpha exp(-d^2 / sigma) / sigma`` with both set by hand for its networks. Here s = ``sigma`` times
    the median squared distance over all pairs, renewed every round, because the distances of adapters depend on rank,
    scale and learning rate; and ``step`` in [0, 1], divided by N, keeps every mixture convex: at 1, equal models are
    plainly averaged. A client not heard yet receives the unweighted mean of all models.

    Deployed: "personal", the model that it last trained (one that never trained: what it received); variant "cloud",
    u_i. The server sees every client's model. Equal ranks.

    Travels: A, B, shared extras: u_i down, w_i up. Stays: private extras, a copy of w_i. Paper: arXiv 2007.03797.

    >>> trees = {"a": {"x": torch.zeros(1)}, "b": {"x": torch.ones(1)}, "c": {"x": torch.ones(1)}}
    >>> attention(trees, sigma=1.0, step=1.0)["b"]["c"] == 1 / 3  # they are equal
    True
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)
    proximal: NotNegative = 0.1
    sigma: Positive = 1.0
    step: Share = 1.0

    @property
    def aggregator(self) -> Collect:
        return Collect()

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        if not 0 <= self.step <= 1 or self.sigma <= 0:
            raise Unsuitable(
                f"fedamp mixes with step {self.step} and sigma {self.sigma}", "take step in [0, 1] and sigma above 0"
            )
        return {"start": start(spec, seed, self.extras), "models": {}, "shares": {}}

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        equal_ranks(state["start"], client, "fedamp")
        models: Mapping[str, Tree] = state["models"]
        if not models:
            return state["start"]
        alike = dict.fromkeys(models, 1 / len(models))
        return {**state["start"], **mixture(models, state["shares"].get(client.id, alike))}

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        near = Proximal(self.proximal, payload) if self.proximal else None
        model = Model({**payload, **self.extras.staying(memory)})
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "A", "B"), proximal=near)
        arrays = {key: tuned.params[key] for key in difference(payload, payload)}
        return Update(arrays, local.examples, tuned.sums), tuned.params

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(difference(state["start"], state["start"]))

    def server_update(self, state: State, value: Mapping[str, Any], round: int) -> State:
        models = {**state["models"], **{name: entry["arrays"] for name, entry in value.items()}}
        return {**state, "models": models, "shares": attention(models, self.sigma, self.step)}

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        return {
            "personal": Model({**payload, **memory}),
            "cloud": Model({**payload, **self.extras.staying(memory)}),
        }
        yield


def attention(models: Mapping[str, Tree], sigma: float, step: float) -> dict[str, dict[str, float]]:
    """xi, (client, client): ``step / N exp(-d^2 / (sigma median d^2))``, and on the diagonal what is left of 1."""
    names = sorted(models)
    flat = torch.stack([torch.cat([v.double().flatten() for _, v in sorted(models[name].items())]) for name in names])
    squared = torch.stack([(flat - one).square().sum(1) for one in flat])
    apart = squared[squared > 0]
    scale = sigma * float(np.median(apart.numpy())) if len(apart) else 1.0
    share: Tensor = (step / len(names)) * (-squared / scale).exp()
    share.fill_diagonal_(0.0)
    share += torch.diag(1 - share.sum(1))
    rows: list[list[float]] = share.tolist()  # type: ignore[reportUnknownMemberType]
    return {name: dict(zip(names, row)) for name, row in zip(names, rows)}
