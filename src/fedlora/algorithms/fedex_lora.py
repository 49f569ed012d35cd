"""FedEx-LoRA: factors averaged, and what that misses put into the base (arXiv 2410.09432)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedlora.adapters.algebra import add, cast, difference, frobenius, product, shapes
from fedlora.adapters.lowrank import DEAD, svd
from fedlora.algorithms.merging import Spread, equal_ranks, kept_base, received, residual, sent, start, trained
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree

State = Mapping[str, Any]


@dataclass(frozen=True)
class FedExLoRA(Algorithm[State, Tree, Mapping[str, Tree]]):
    """Averages A and B as FedIT does, and adds what the average of factors misses to the base: the round is exact.

        A <- sum_i p_i A_i,   B <- sum_i p_i B_i,   W <- W + s (sum_i p_i B_i A_i - B A)        p_i = n_i / sum n

    The residual of k clients has rank (k - 1) r; it is kept in factors of exactly that rank (an SVD drops what lies
    below rounding), or densely where that is smaller. A payload holds all residuals, so a client that missed rounds
    gets all it missed. Equal ranks.

    Travels: up, A and B; down, A, B and one residual a round; shared extras both ways. Stays: private extras. Paper:
    arXiv 2410.09432.

    >>> import torch
    >>> spec = ModelSpec({"q": (9, 9)}, {"q": 1}, {}, (), width=9, alpha=1.0)
    >>> fedex = FedExLoRA()
    >>> state, acc = fedex.server_init(spec, seed=0), fedex.aggregator.zero()
    >>> for name, step in (("a", 1.0), ("b", -1.0)):          # the steps cancel in A and in B, but not in B A
    ...     arrays = {"q/A": step * torch.ones(1, 9), "q/B": step * torch.ones(9, 1)}
    ...     acc = fedex.aggregator.accumulate(acc, Client(name, {"q": 1}), Update(arrays, 1.0, {}))
    >>> [merge] = fedex.server_update(state, fedex.aggregator.report(acc), round=1)["merges"].values()
    >>> bool(torch.allclose(product(merge, "q"), torch.ones(9, 9)))
    True
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)

    @property
    def aggregator(self) -> Spread:
        return Spread()

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        kept_base(self.extras, "fedex-lora")
        return {"tree": start(spec, seed, self.extras), "merges": {}}

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        equal_ranks(state["tree"], client, "fedex-lora")
        return {**state["tree"], **sent(state["merges"])}

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        shared, merges = received(payload)
        model = Model({**shared, **memory}, shared=merges)
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "A", "B"))
        return Update(difference(tuned.params, shared), local.examples, tuned.sums), self.extras.staying(tuned.params)

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(difference(state["tree"], state["tree"]))

    def server_update(self, state: State, value: Mapping[str, Tree], round: int) -> State:
        tree = add(state["tree"], value["mean"])
        merge: dict[str, Tensor] = {}
        for site in spread_sites(value):
            exact = {key: entry for key, entry in value["products"].items() if key.rpartition("/")[0] == site}
            missed = shortest(residual(value, site), site, DEAD * frobenius(exact))
            if f"{site}/A" in missed:
                missed[f"{site}/scale"] = tree[f"{site}/scale"].double()
            elif missed:
                missed[f"{site}/W"] = missed[f"{site}/W"] * tree[f"{site}/scale"].double()
            merge |= cast(missed, tree[f"{site}/scale"].dtype)
        return {"tree": tree, "merges": {**state["merges"], f"{round:06d}": merge} if merge else state["merges"]}

    def server_model(self, state: State) -> Model | None:
        return None if self.extras.personal else Model(state["tree"], shared=tuple(state["merges"].values()))

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        shared, merges = received(payload)
        return {"personal" if self.extras.personal else "global": Model({**shared, **memory}, shared=merges)}
        yield


def spread_sites(value: Mapping[str, Tree]) -> list[str]:
    """The sites of a ``Spread``'s report."""
    return sorted(key.removesuffix("/A") for key in value["mean"] if key.endswith("/A"))


def shortest(tree: Tree, site: str, nothing: float) -> dict[str, Tensor]:
    """The same change in as few numbers as it takes: factors of its own rank (scale 1), or W; singular values up to
    ``nothing`` are rounding. Empty where there are no others."""
    u, s, vt = svd(tree, site)
    rank = int((s > nothing).sum())
    if rank * (len(u) + vt.shape[1]) >= len(u) * vt.shape[1]:
        return {f"{site}/W": product(tree, site)}
    return {f"{site}/A": vt[:rank], f"{site}/B": u[:, :rank] * s[:rank]} if rank else {}
