"""SLoRA: sparse full tuning first, then LoRA from the SVD of what it changed (arXiv 2308.06522)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.adapters.algebra import adapter, add, cast, difference, ranks, shapes, sites, whole
from fedlora.adapters.lowrank import truncate
from fedlora.algorithms.merging import Average, Bucket, Merging, Svd, trained
from fedlora.federation.algorithm import Aggregator, Algorithm, Count, Fraction, Kind, Update, Whole
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree, derive, stream

State = Mapping[str, Any]
SPARSE = "/sparse"  # what travels in stage 1, per site


@dataclass(frozen=True)
class SLoRA(Algorithm[State, Tree, Tree]):
    """Stage 1 tunes a sparse part of the weights themselves; stage 2 is FedIT, from the best LoRA of what it changed.

        stage 1   rounds 1 .. sparse_rounds:   W = W0 + M o V,    V <- V + sum_i p_i (V_i - V)          averaged exactly
        between   M o V = U S V^T;   A = V_r^T,   B = U_r S_r / s
        stage 2   A, B from W0 on, ``merge = "average" | "svd" | "bucket"`` (see FedIT)

    The mask M is the same for everybody, drawn from the run's seed, and holds a share ``density`` of every site: k
    random rows by k random columns, k = sqrt(density out in), so that stage 1 trains k x k numbers in factors
    (``B C A`` with B and A selecting rows and columns), in lanes, and sends them without an index. The paper draws the
    entries one by one. What of the change the adapter cannot hold is lost between the stages: ``measures`` has its
    share, per site. A run of fewer than ``sparse_rounds`` rounds ends in stage 1. Ranks may differ with ``merge =
    "svd"`` or ``"bucket"``.

    Travels: in stage 1, k x k numbers a site both ways, then as FedIT; shared extras always. Stays: private extras.
    Paper: arXiv 2308.06522.

    >>> spec = ModelSpec({"q": (40, 10)}, {"q": 2}, {}, (), width=40)
    >>> slora = SLoRA(density=0.04)
    >>> payload = slora.broadcast(slora.server_init(spec, seed=0), Client("a", {"q": 2}), round=1)
    >>> {name: tuple(value.shape) for name, value in payload.items()}
    {'q/sparse': (4, 4)}
    """

    given_start = False

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)
    sparse_rounds: Count = 5
    density: Fraction = 0.01
    merge: Literal["average", "svd", "bucket"] = "average"
    bucket_rank: Whole | None = None

    @property
    def merging(self) -> Merging:
        """The way of merging that ``merge`` names."""
        return {"average": Average(), "svd": Svd(), "bucket": Bucket(self.bucket_rank)}[self.merge]

    @property
    def aggregator(self) -> Aggregator[Any, Tree]:
        return self.merging.aggregator

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        merged = self.merging.init(spec, seed, self.extras)
        sparse = frame(spec, self.density, seed) if self.sparse_rounds else None
        return {"seed": seed, "merged": merged, "sparse": sparse, "error": {}}

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        served = self.merging.serve(state["merged"], client)  # refuses ranks in stage 1 already
        return served if state["sparse"] is None else cores(state["sparse"]) | whole(served)

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        model, factors = Model({**self.params(payload, local), **memory}), ("C",) if sparse(payload) else ("A", "B")
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, *factors))
        stays = self.extras.staying(tuned.params)
        if sparse(payload):
            arrays = difference({**tuned.params, **cores(tuned.params)}, payload)
        else:
            arrays = self.merging.send(tuned.params, payload)
        return Update(arrays, local.examples, tuned.sums), stays

    def params(self, payload: Tree, local: Local) -> dict[str, Tensor]:
        """What a payload puts on the base."""
        if not sparse(payload):
            return dict(payload)
        held = frame(local.spec, self.density, local.run_seed)
        held |= {f"{site}/C": payload[site + SPARSE] for site in sites(held)}
        return held | {name: value for name, value in payload.items() if not name.endswith(SPARSE)}

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        served = self.broadcast(state, client, round)
        return shapes(served) if state["sparse"] is not None else self.merging.expects(served)

    def server_update(self, state: State, value: Tree, round: int) -> State:
        if state["sparse"] is None:
            return {**state, "merged": self.merging.update(state["merged"], value, round)}
        step = {name.removesuffix(SPARSE) + "/C": entry for name, entry in value.items() if name.endswith(SPARSE)}
        rest = {name: entry for name, entry in value.items() if not name.endswith(SPARSE)}
        tuned = add(state["sparse"], step)
        if round < self.sparse_rounds:
            return {**state, "merged": with_whole(state["merged"], rest), "sparse": tuned}
        merged, error = self.between(with_whole(state["merged"], rest), tuned, derive(state["seed"], round))
        return {**state, "merged": merged, "sparse": None, "error": error}

    def between(self, merged: State, tuned: Tree, seed: int) -> tuple[State, dict[str, float]]:
        """The adapter's state started from the sparse change, and the share of it that was lost, per site."""
        if isinstance(self.merging, Svd):
            begun = self.merging.update(merged, tuned, 0)
            return begun, begun["error"]
        tree, errors = dict(merged), dict[str, float]()
        for site, rank in ranks(adapter(tree)).items():
            right, left, errors[site] = truncate(tuned, site, rank, derive(seed, site))
            left = left / tree[f"{site}/scale"].double()
            tree |= cast({f"{site}/A": right, f"{site}/B": left}, tree[f"{site}/A"].dtype)
        return tree, errors

    def server_model(self, state: State) -> Model | None:
        if self.extras.personal:
            return None
        model = self.merging.model(state["merged"])
        return model if state["sparse"] is None else Model({**state["sparse"], **whole(model.params)})

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        name = "personal" if self.extras.personal else "sparse" if sparse(payload) else self.merging.served
        return {name: Model({**self.params(payload, local), **memory})}
        yield

    def measures(self, state: State) -> Mapping[str, float]:
        lost = {f"start/{site}": error for site, error in state["error"].items()}
        return lost if state["sparse"] is not None else {**lost, **self.merging.measures(state["merged"])}


def frame(spec: ModelSpec, density: float, seed: int) -> dict[str, Tensor]:
    """The masked change as B C A: per site C = 0 (k, k), and B (out, k), A (k, in) that select its rows and columns."""
    tree: dict[str, Tensor] = {}
    for site, (out, inner) in spec.sites.items():
        k = max(1, min(round(math.sqrt(density * out * inner)), out, inner))
        left, right = torch.zeros(out, k, dtype=spec.dtype), torch.zeros(k, inner, dtype=spec.dtype)
        left[chosen(seed, site, "rows", out, k), torch.arange(k)] = 1
        right[torch.arange(k), chosen(seed, site, "columns", inner, k)] = 1
        core, scale = torch.zeros(k, k, dtype=spec.dtype), torch.ones((), dtype=spec.dtype)
        tree |= {f"{site}/A": right, f"{site}/B": left, f"{site}/C": core, f"{site}/scale": scale}
    return tree


def chosen(seed: int, site: str, name: str, size: int, k: int) -> Tensor:
    """k of ``size`` indices, sorted, the same on every side."""
    return torch.randperm(size, generator=stream(seed, site, "mask", name))[:k].sort().values


def cores(tree: Tree) -> dict[str, Tensor]:
    """The numbers of the masked change, as they travel."""
    return {site + SPARSE: tree[f"{site}/C"] for site in sites(tree)}


def sparse(payload: Tree) -> bool:
    """Whether a payload is of stage 1."""
    return any(name.endswith(SPARSE) for name in payload)


def with_whole(merged: State, change: Tree) -> State:
    """A way of merging's state with its whole parameters moved."""
    if "whole" in merged:
        return {**merged, "whole": add(merged["whole"], change)}
    return add(merged, change)
