"""Standalone: each client trains a model of its own, alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class Standalone(Algorithm[Tree, Tree, Tree]):
    """Each client trains its whole model on its own data, round after round: what collaboration must beat.

    As ``local``, but for models of the clients' own, trained whole; deployed is the latest.

    Travels: nothing. Stays: the private model with its head (``extras`` do not apply).

    >>> spec, alone = ModelSpec({}, {}, {"head/bias": (2,)}, ("no", "yes"), width=5), Standalone()
    >>> alone.server_update(alone.server_init(spec, seed=0), {}, round=1)
    {}
    """

    given_start = False
    private_backbones = True
    adapts = False

    training: Training = field(default_factory=Training)

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        return {}

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        kinds = ("backbone", "head") if "head/weight" in local.spec.whole else ("backbone",)
        tuned = yield from self.training.fit(local, Model(memory, backbone=local.client.backbone), kinds)
        return Update({}, local.examples, tuned.sums), tuned.params

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return {}

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return state

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        return {"local": Model(memory, backbone=local.client.backbone)}
        yield
