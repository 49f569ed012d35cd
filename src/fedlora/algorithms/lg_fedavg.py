"""LG-FedAvg: private representations, one shared head (arXiv 2001.01523)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlora.adapters.algebra import add, difference, shapes
from fedlora.algorithms.merging import needs_labels
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class LGFedAvg(Algorithm[Tree, Tree, Tree]):
    """Every client owns its representation; the head on top is everybody's.

        client:  theta_i, H_i <- local training of f_theta_i and the head, begun at the received H
        server:  H <- H + sum_i p_i (H_i - H),       p_i = n_i / sum n over the round

    Deployed: "global-head", the private representation under the head as received; variant "own-head", under the head
    as the client last trained it.

    Travels: the head, both ways. Stays: the private model (``extras`` do not apply). Paper: arXiv 2001.01523.

    >>> spec = ModelSpec({}, {}, {"head/weight": (2, 5), "head/bias": (2,)}, ("no", "yes"), width=5)
    >>> sorted(LGFedAvg().server_init(spec, seed=0))
    ['head/bias', 'head/weight']
    """

    given_start = False
    private_backbones = True
    adapts = False

    training: Training = field(default_factory=Training)

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        needs_labels(spec, "lg-fedavg")
        return {name: value for name, value in spec.start(seed).items() if name.startswith("head/")}

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        model = Model({**memory, **payload}, backbone=local.client.backbone)
        tuned = yield from self.training.fit(local, model, ("backbone", "head"))
        return Update(difference(tuned.params, payload), local.examples, tuned.sums), tuned.params

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(state)

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        whose = local.client.backbone
        return {
            "global-head": Model({**memory, **payload}, backbone=whose),
            "own-head": Model({**payload, **memory}, backbone=whose),
        }
        yield
