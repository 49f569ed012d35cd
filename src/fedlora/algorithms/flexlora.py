"""FlexLoRA: heterogeneous ranks by SVD redistribution (arXiv 2402.11505)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora.adapters.algebra import shapes
from fedlora.algorithms.merging import Svd, trained
from fedlora.federation.aggregate import Products
from fedlora.federation.algorithm import Algorithm, Count, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree

State = Mapping[str, Any]
MERGING = Svd()


@dataclass(frozen=True)
class FlexLoRA(Algorithm[State, Tree, Tree]):
    """Every client at the rank it can afford: the exact sum of products, redistributed by truncated SVD.

        client i (rank r_i):  A_i, B_i <- one local epoch
        server, per site:     dW = sum_i p_i s_i B_i A_i = U S V^T       exact; p_i = n_i / sum n over the round
        to rank r:            A = V_r^T,  B = U_r S_r / s_r              so that s_r B A is the best of rank r

    One decomposition a round, at the largest rank; serving is slicing. "global" is W0 + dW undecomposed, variant
    "truncated" what a client holds of it; ``measures`` has the share of |dW| that the largest rank loses, per site.
    ``finetune_epochs`` more at home, at a constant rate, are variant "finetuned".

    The paper's resource types are rank 8 everywhere, 30 everywhere, 30 in attention and 200 elsewhere, 200 everywhere;
    its distributions over them are ``[clients] ranks = "uniform"``, "normal", "heavy-tail-light", "heavy-tail-strong",
    and with the shares of its code, "heavy-tail-light-released" and "heavy-tail-strong-released". With "-small" at the
    end the types are ranks 2, 4, 8 and 16.

    Travels: up, the client's A and B; down, its slice; shared extras both ways. Stays: private extras. Paper: arXiv
    2402.11505.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 2}, {}, (), width=3, alpha=2.0)
    >>> flex = FlexLoRA()
    >>> update = {"q/W": torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])}
    >>> state = flex.server_update(flex.server_init(spec, seed=0), update, round=1)
    >>> small = flex.broadcast(state, Client("a", {"q": 1}), round=2)
    >>> small["q/scale"] * small["q/B"] @ small["q/A"] + 0
    tensor([[3., 0.],
            [0., 0.],
            [0., 0.]])
    """

    training: Training = field(default_factory=lambda: Training(epochs=1))
    extras: Extras = field(default_factory=Extras)
    finetune_epochs: Count = 0

    @property
    def aggregator(self) -> Products:
        return MERGING.aggregator

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        return MERGING.init(spec, seed, self.extras)

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        return MERGING.serve(state, client)

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        model = Model({**payload, **memory})
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "A", "B"))
        arrays = MERGING.send(tuned.params, payload)
        return Update(arrays, local.examples, tuned.sums), self.extras.staying(tuned.params)

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(MERGING.serve(state, client))

    def server_update(self, state: State, value: Tree, round: int) -> State:
        return MERGING.update(state, value, round)

    def server_model(self, state: State) -> Model | None:
        return None if self.extras.personal else MERGING.model(state)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        params = {**payload, **memory}
        variants = {"personal" if self.extras.personal else "truncated": Model(params)}
        if self.finetune_epochs:  # the schedule ends near zero: what follows the last round has its own, full rate
            constant = replace(self.training, schedule="constant")
            train = trained(local.spec, self.extras, "A", "B")
            tuned = yield from constant.fit(local, Model(params), train, epochs=self.finetune_epochs)
            variants = {"finetuned": Model(tuned.params), **variants}
        return variants

    def measures(self, state: State) -> Mapping[str, float]:
        return MERGING.measures(state)
