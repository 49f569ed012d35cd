"""FLoRA: stacked adapters, merged exactly into the base every round (arXiv 2409.05976)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora.adapters.algebra import adapter, add, cast, difference, shapes, whole
from fedlora.algorithms.merging import adapted, kept_base, received, sent, trained
from fedlora.federation.aggregate import Products
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree, derive

State = Mapping[str, Any]


@dataclass(frozen=True)
class FLoRA(Algorithm[State, Tree, Tree]):
    """Stacks the clients' factors and merges their exact sum into the base every round; adapters start afresh.

        dW_t = sum_i p_i s_i B_i A_i = [p_1 s_1 B_1, p_2 s_2 B_2, ...] [A_1; A_2; ...],    W_t = W_{t-1} + dW_t

    p_i = n_i / sum n over the round; ranks may differ. The fresh start of a round derives from the run's seed. A
    payload holds all merges, so a client that missed rounds gets all it missed; a wire that remembers what a peer holds
    sends only the new ones, and an engine merges them once for all clients.

    Travels: up, A and B; down, one merge a round (stacked factors, or dense where that is smaller); shared extras both
    ways. Stays: private extras. Paper: arXiv 2409.05976.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {}, (), width=3)
    >>> flora = FLoRA()
    >>> state = flora.server_init(spec, seed=0)
    >>> for round in (1, 2):
    ...     state = flora.server_update(state, {"q/W": round * torch.ones(3, 2)}, round)
    >>> sum(merge["q/W"][0, 0] for merge in flora.server_model(state).shared)
    tensor(3.)
    """

    given_start = False

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)

    @property
    def aggregator(self) -> Products:
        return Products()

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        adapted(spec)
        kept_base(self.extras, "flora")
        return {
            "merges": {},
            "whole": self.extras.travelling(spec.start(seed)),
            "sites": {site: list(size) for site, size in spec.sites.items()},
            "type": spec.scale(next(iter(spec.sites)), 1),
        }

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        return {**state["whole"], **sent(state["merges"])}

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        shared, merges = received(payload)
        fresh = local.spec.adapter(local.client.ranks, derive(local.run_seed, "fresh", local.round))
        model = Model({**fresh, **shared, **memory}, shared=merges)
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "A", "B"))
        arrays = adapter(tuned.params) | difference(tuned.params, shared)
        return Update(arrays, local.examples, tuned.sums), self.extras.staying(tuned.params)

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        expected = shapes(state["whole"])
        for site, (out, inner) in state["sites"].items():
            rank = min(client.ranks[site], out, inner)
            expected |= {f"{site}/A": (rank, inner), f"{site}/B": (out, rank), f"{site}/scale": ()}
        return expected

    def server_update(self, state: State, value: Tree, round: int) -> State:
        merge = cast(adapter(value), state["type"].dtype)
        merges = {**state["merges"], f"{round:06d}": merge}
        return {**state, "merges": merges, "whole": add(state["whole"], whole(value))}

    def server_model(self, state: State) -> Model | None:
        return None if self.extras.personal else Model(state["whole"], shared=tuple(state["merges"].values()))

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        shared, merges = received(payload)
        name = "personal" if self.extras.personal else "merged"
        return {name: Model({**shared, **memory}, shared=merges)}
        yield
