"""FML: federated mutual learning (arXiv 2006.16765)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedlora.adapters.algebra import add, difference, shapes
from fedlora.algorithms.distillation import divergence
from fedlora.algorithms.merging import equal_ranks, start, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Share, Update
from fedlora.federation.orders import Batch, Model, Outputs, Training, Work, label_loss
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree

Memory = Mapping[str, Any]


@dataclass(frozen=True)
class FML(Algorithm[Tree, Memory, Tree]):
    """A private model and a shared adapter learn from the labels and from each other, on the same batches.

        L_private = a CE + (1 - a) KL(shared || private),     L_shared = b CE + (1 - b) KL(private || shared)
        theta <- theta + sum_i p_i (theta_i - theta),         p_i = n_i / sum n over the round

    Teachers are constants in each other's loss. Deployed: "private"; variant "shared". Equal ranks.

    Travels: A, B and shared extras of the shared model, both ways. Stays: the private model with its head (always
    trained), private extras of the shared one. With ``[adapter] targets = []`` and ``extras = {backbone = "share"}``
    the shared model is a whole one, as in the paper. Paper: arXiv 2006.16765.

    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {"head/bias": (2,)}, ("no", "yes"), width=3)
    >>> sorted(FML().server_init(spec, seed=0))
    ['head/bias', 'q/A', 'q/B', 'q/scale']
    """

    private_backbones = True

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)
    a: Share = 0.5
    b: Share = 0.5

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        return start(spec, seed, self.extras)

    def client_init(self, local: Local) -> Work[tuple[None, Memory]]:
        return None, {"private": {}, "staying": {}}  # nothing yet: the first fit starts from the models' own values
        yield

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        equal_ranks(state, client, "fml")
        return state

    def client_update(self, payload: Tree, memory: Memory, local: Local) -> Work[tuple[Update, Memory]]:
        tuned = yield from self.training.fit(
            local,
            {"private": self.mine(memory, local), "shared": Model({**payload, **memory["staying"]})},
            {
                "private": trained(local.spec, Extras(head="private"), "backbone"),
                "shared": trained(local.spec, self.extras, *(("A", "B") if local.spec.sites else ())),
            },
            objective=Mutual(self.a, self.b),
        )
        shared = tuned.models["shared"]
        kept = {"private": tuned.models["private"], "staying": self.extras.staying(shared)}
        return Update(difference(shared, payload), local.examples, tuned.sums), kept

    def mine(self, memory: Memory, local: Local) -> Model:
        """The client's private model."""
        return Model(memory["private"], backbone=local.client.backbone)

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(difference(state, state))

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def server_model(self, state: Tree) -> Model | None:
        return None if self.extras.personal else Model(state)

    def personalize(self, payload: Tree, memory: Memory, local: Local) -> Work[Mapping[str, Model]]:
        return {"private": self.mine(memory, local), "shared": Model({**payload, **memory["staying"]})}
        yield


@dataclass(frozen=True)
class Mutual:
    """The sum of both losses."""

    a: float
    b: float

    def __call__(self, outputs: Mapping[str, Outputs], params: Mapping[str, Tree], batch: Batch) -> Tensor:
        mine, shared, labels = outputs["private"].logits, outputs["shared"].logits, batch.labels
        private = self.a * label_loss(mine, labels) + (1 - self.a) * divergence(mine, shared, labels)
        return private + self.b * label_loss(shared, labels) + (1 - self.b) * divergence(shared, mine, labels)
