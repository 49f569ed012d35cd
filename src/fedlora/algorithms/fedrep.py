"""FedRep: a shared adapter under private heads, trained in turn (arXiv 2102.07078)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedlora.adapters.algebra import add, difference, shapes
from fedlora.algorithms.merging import equal_ranks, private_head, start, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Update, Whole
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class FedRep(Algorithm[Tree, Tree, Tree]):
    """The adapter is what clients have in common, the head is what is their own; each is trained with the other fixed.

        h_i     <- training of the head under theta, ``head_epochs`` passes        theta fixed, as received
        theta_i <- training of the adapter under h_i, as [training] says           h_i fixed
        theta   <- theta + sum_i p_i (theta_i - theta),                            p_i = n_i / sum n over the round

    Deployed: theta under h_i, as it stands. A client without a head yet (a newcomer that is scored) first trains one,
    at a constant rate. Norms and embeddings that train go with the adapter. No single global model; tasks without a
    head are refused. Equal ranks.

    Travels: A, B, shared extras but the head, both ways. Stays: the head, private extras. Paper: arXiv 2102.07078 (its
    ten passes of the head, then one of the rest).

    >>> from fedlora.federation.orders import Tuned
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {"head/bias": (2,)}, ("no", "yes"), width=3)
    >>> me, fedrep = Local(Client("a", {"q": 1}), spec, 1, 5, 0, 10, {}), FedRep()
    >>> work = fedrep.client_update(fedrep.server_init(spec, seed=0), {}, me)
    >>> first = next(work)
    >>> first.train, first.epochs
    (('head',), 10)
    >>> work.send(Tuned({"model": {**first.models.params}}, {}, 1)).train
    ('A', 'B')
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=lambda: Extras(head="private"))
    head_epochs: Whole = 10

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        private_head(spec, self.extras, "fedrep")
        return start(spec, seed, self.extras)

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        equal_ranks(state, client, "fedrep")
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        headed = yield from self.training.fit(local, Model({**payload, **memory}), ("head",), epochs=self.head_epochs)
        rest = tuple(name for name in trained(local.spec, self.extras, "A", "B") if name != "head")
        tuned = yield from self.training.fit(local, Model(headed.params), rest)
        return Update(difference(tuned.params, payload), local.examples, tuned.sums), self.extras.staying(tuned.params)

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(difference(state, state))

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        if not memory:
            constant = replace(self.training, schedule="constant")  # a schedule ends near zero
            headed = yield from constant.fit(local, Model(payload), ("head",), epochs=self.head_epochs)
            return {"personal": Model(headed.params)}
        return {"personal": Model({**payload, **memory})}
