"""Ditto: a personal model beside the averaged one, pulled towards it (arXiv 2012.04221)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlora.adapters.algebra import add, difference, shapes
from fedlora.algorithms.merging import equal_ranks, start, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, NotNegative, Update
from fedlora.federation.orders import Model, Proximal, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree

Memory = Mapping[str, Tree]


@dataclass(frozen=True)
class Ditto(Algorithm[Tree, Memory, Tree]):
    """Two models a client: the averaged one as in FedIT, and a personal one that never leaves, pulled to it.

        theta <- theta + sum_i p_i (theta_i - theta),                       p_i = n_i / sum n over the round
        v_i   <- local training of  f_i(v_i) + proximal / 2 |v_i - theta|^2      theta as received, v_i from v_i

    The pull is on A, B and the shared extras each, not on their product; what is private is not pulled. v_i starts as
    the first theta received; a client that never trained deploys theta. Deployed: "personal"; variant "global". A round
    trains twice. ``proximal = 0``: local training beside an average that it does not use. Equal ranks.

    Travels: A, B, shared extras, both ways. Stays: v_i (adapter and head), private extras. Paper: arXiv 2012.04221.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {}, (), width=3)
    >>> ditto = Ditto(proximal=0.5)
    >>> state = ditto.server_update(ditto.server_init(spec, seed=0), {"q/B": torch.ones(3, 1).double()}, round=1)
    >>> me = Local(Client("a", {"q": 1}), spec, 2, 5, 0, 10, {})
    >>> work = ditto.client_update(ditto.broadcast(state, me.client, 2), {"own": {}, "private": {}}, me)
    >>> next(work).proximal is None  # the first order trains theta
    True
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)
    proximal: NotNegative = 0.1

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        return start(spec, seed, self.extras)

    def client_init(self, local: Local) -> Work[tuple[None, Memory]]:
        return None, {"own": {}, "private": {}}
        yield

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        equal_ranks(state, client, "ditto")
        return state

    def client_update(self, payload: Tree, memory: Memory, local: Local) -> Work[tuple[Update, Memory]]:
        train = trained(local.spec, self.extras, "A", "B")
        tuned = yield from self.training.fit(local, Model({**payload, **memory["private"]}), train)
        near = Proximal(self.proximal, payload) if self.proximal else None
        own = yield from self.training.fit(local, Model({**payload, **memory["own"]}), train, proximal=near)
        kept = {"own": own.params, "private": self.extras.staying(tuned.params)}
        return Update(difference(tuned.params, payload), local.examples, tuned.sums), kept

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(difference(state, state))

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def server_model(self, state: Tree) -> Model | None:
        return None if self.extras.personal else Model(state)

    def personalize(self, payload: Tree, memory: Memory, local: Local) -> Work[Mapping[str, Model]]:
        return {
            "personal": Model({**payload, **memory["own"]}),
            "global": Model({**payload, **memory["private"]}),
        }
        yield
