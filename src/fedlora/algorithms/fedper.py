"""FedPer: a shared adapter under private heads (arXiv 1912.00818)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedlora.adapters.algebra import add, difference, shapes
from fedlora.algorithms.merging import equal_ranks, private_head, start, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class FedPer(Algorithm[Tree, Tree, Tree]):
    """Base and adapter are everybody's, the head is the client's own; both are trained together.

        theta_i, h_i <- local training of (theta, h_i);   theta <- theta + sum_i p_i (theta_i - theta),  p_i = n_i / n

    Deployed: theta under h_i. A client without a head yet (a newcomer that is scored) first trains one under theta, for
    a round's length at a constant rate. This is FedIT with a private head, under its paper's name. No single global
    model; tasks without a head are refused. Equal ranks.

    Travels: A, B, shared extras but the head, both ways. Stays: the head, private extras. Paper: arXiv 1912.00818.

    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {"head/bias": (2,)}, ("no", "yes"), width=3)
    >>> sorted(FedPer().server_init(spec, seed=0))
    ['q/A', 'q/B', 'q/scale']
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=lambda: Extras(head="private"))

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        private_head(spec, self.extras, "fedper")
        return start(spec, seed, self.extras)

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        equal_ranks(state, client, "fedper")
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        model = Model({**payload, **memory})
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "A", "B"))
        return Update(difference(tuned.params, payload), local.examples, tuned.sums), self.extras.staying(tuned.params)

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(difference(state, state))

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        if not memory:
            constant = replace(self.training, schedule="constant")  # a schedule ends near zero
            headed = yield from constant.fit(local, Model(payload), ("head",))
            return {"personal": Model(headed.params)}
        return {"personal": Model({**payload, **memory})}
