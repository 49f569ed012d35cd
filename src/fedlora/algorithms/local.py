"""Local: each client alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora.algorithms.merging import trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Score, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree

Memory = Mapping[str, Any]


@dataclass(frozen=True)
class LocalOnly(Algorithm[Tree, Memory, Tree]):
    """Each client alone: its own adapter and head, trained round after round on its own data.

    ``select``: train on "fit" and deploy the round with the lowest loss per example on "holdout", so that the number
    of epochs is chosen by validation (a client without held-out examples deploys its latest); variant "latest" is the
    model after the last round. Without it, train on everything and deploy the latest.

    Travels: nothing. Stays: all of it.

    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {}, (), width=3)
    >>> alone = LocalOnly()
    >>> alone.server_update(alone.server_init(spec, seed=0), {}, round=1)
    {}
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=lambda: Extras(head="private"))
    select: bool = True

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        return {}

    def client_init(self, local: Local) -> Work[tuple[None, Memory]]:
        own = local.spec.adapter(local.client.ranks, local.run_seed)
        return None, {"latest": own, "best": own, "loss": None}
        yield

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        return state

    def client_update(self, payload: Tree, memory: Memory, local: Local) -> Work[tuple[Update, Memory]]:
        split = "fit" if self.select else "train"
        model = Model(memory["latest"])
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "A", "B"), split=split)
        latest, loss = tuned.params, None
        if self.select:
            sums = yield from Score(Model(latest), "holdout")
            total, count = sums.get("loss", (0.0, 0.0))
            loss = total / count if count else None
            loss = math.inf if loss is not None and math.isnan(loss) else loss  # worse than any
        better = loss is None or memory["loss"] is None or loss < memory["loss"]
        kept = {"best": latest, "loss": loss} if better else {"best": memory["best"], "loss": memory["loss"]}
        return Update({}, local.examples, tuned.sums), {"latest": latest, **kept}

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return {}

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return state

    def personalize(self, payload: Tree, memory: Memory, local: Local) -> Work[Mapping[str, Model]]:
        best = {"local": Model(memory["best"])}
        return {**best, "latest": Model(memory["latest"])} if self.select else best
        yield
