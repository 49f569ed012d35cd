"""FFA-LoRA: A frozen at a shared random start (arXiv 2403.12313)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlora.adapters.algebra import add, difference, part, shapes, whole
from fedlora.algorithms.merging import equal_ranks, start, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class FFALoRA(Algorithm[Tree, Tree, Tree]):
    """A stays at one random start that all share, only B is trained: the average of B is the average of the products.

        sum_i p_i s B_i A_0 = s (sum_i p_i B_i) A_0,   p_i = n_i / sum n over the round

    A_0 derives from the run's seed on every side and is never sent: half of FedIT's traffic. Equal ranks.

    Travels: B and shared extras, both ways. Stays: A_0, private extras. Paper: arXiv 2403.12313.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {}, (), width=3)
    >>> ffa = FFALoRA()
    >>> state = ffa.server_update(ffa.server_init(spec, seed=0), {"q/B": torch.ones(3, 1).double()}, round=1)
    >>> ffa.broadcast(state, Client("a", {"q": 1}), round=2)
    {'q/B': tensor([[1.],
            [1.],
            [1.]])}
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        return start(spec, seed, self.extras)

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        equal_ranks(state, client, "ffa-lora")
        return part(state, ("B",)) | whole(state)

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        model = Model({**frozen(local), **payload, **memory})
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "B"))
        arrays = difference(tuned.params, payload)
        return Update(arrays, local.examples, tuned.sums), self.extras.staying(tuned.params)

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(self.broadcast(state, client, round))

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def server_model(self, state: Tree) -> Model | None:
        return None if self.extras.personal else Model(state)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        name = "personal" if self.extras.personal else "global"
        return {name: Model({**frozen(local), **payload, **memory})}
        yield


def frozen(local: Local) -> Tree:
    """A_0 and the scales, as every side derives them."""
    return part(local.spec.adapter(local.client.ranks, local.run_seed), ("A", "scale"))
