"""FedSA-LoRA: share A, keep B (arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedlora.adapters.algebra import add, difference, part, shapes, whole
from fedlora.algorithms.merging import equal_ranks, start, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class FedSALoRA(Algorithm[Tree, Tree, Tree]):
    """Both factors are trained; A is averaged (what is general), B stays at home (what is the client's own).

        A <- A + sum_i p_i (A_i - A),   p_i = n_i / sum n over the round;     client i's model:  W0 + s B_i A

    There is no single global model. Equal ranks.

    Travels: A and shared extras, both ways. Stays: B, private extras. Paper: arXiv 2410.01463.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {}, (), width=3)
    >>> fedsa = FedSALoRA()
    >>> before = fedsa.server_init(spec, seed=0)
    >>> after = fedsa.server_update(before, {"q/A": torch.ones(1, 2).double()}, round=1)
    >>> fedsa.broadcast(after, Client("a", {"q": 1}), round=2)["q/A"] - before["q/A"]
    tensor([[1., 1.]])
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        return start(spec, seed, self.extras)

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        equal_ranks(state, client, "fedsa-lora")
        return part(state, ("A",)) | whole(state)

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        model = Model(self.own(payload, memory, local))
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "A", "B"))
        kept = part(tuned.params, ("B",)) | self.extras.staying(whole(tuned.params))
        return Update(difference(tuned.params, payload), local.examples, tuned.sums), kept

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(self.broadcast(state, client, round))

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        return {"personal": Model(self.own(payload, memory, local))}
        yield

    def own(self, payload: Tree, memory: Tree, local: Local) -> dict[str, Tensor]:
        """The client's model: B = 0 until it has trained one."""
        return {**local.spec.adapter(local.client.ranks, local.run_seed), **payload, **memory}
