"""Pooled: all data in one place, an upper bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlora.adapters.algebra import add, difference, shapes
from fedlora.algorithms.merging import needs_labels, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class Pooled(Algorithm[Tree, Tree, Tree]):
    """All data pooled: a bound to compare with, not federated.

    One client owns everybody's examples and trains the largest adapter round after round; every client is scored with
    it. Whatever of the whole parameters is not frozen is trained and part of the one model. ``adapter = False`` trains
    nothing else: on a task where that is as good, no adapter is needed and methods cannot be told apart.

    Travels, stays: there is nobody else.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {}, (), width=3)
    >>> pooled = Pooled()
    >>> state = pooled.server_update(pooled.server_init(spec, seed=0), {"q/B": torch.ones(3, 1).double()}, round=1)
    >>> pooled.server_model(state).params["q/B"].T
    tensor([[1., 1., 1.]])
    """

    federated = False

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)
    adapter: bool = True

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        whole = spec.start(seed)
        if not self.adapter:
            needs_labels(spec, "adapter = false")
        adapter = spec.adapter(spec.ranks, seed) if self.adapter else {}
        return {**adapter, **self.extras.travelling(whole), **self.extras.staying(whole)}

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        train = trained(local.spec, self.extras, *(("A", "B") if self.adapter else ()))
        tuned = yield from self.training.fit(local, Model(payload), train)
        return Update(difference(tuned.params, payload), local.examples, tuned.sums), memory

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(difference(state, state))

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def server_model(self, state: Tree) -> Model:
        return Model(state)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        return {"global": Model(payload)}
        yield
