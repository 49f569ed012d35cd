"""HetLoRA: mixed ranks by padding, weighting and truncation (arXiv 2401.06432)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedlora.adapters.algebra import (
    adapter,
    add,
    difference,
    factors,
    frobenius,
    linalg,
    ranks,
    resize,
    shapes,
    sites,
    whole,
)
from fedlora.algorithms.merging import scaling, sliced, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, NotNegative, Share, Update
from fedlora.federation.orders import Batch, Model, Outputs, Training, Work, cross_entropy
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree

State = Mapping[str, Any]
Memory = Mapping[str, Any]


@dataclass(frozen=True)
class HetLoRA(Algorithm[State, Memory, Tree]):
    """Mixed ranks: factors zero-padded to the largest, averaged by the size of each update, truncated for each client.

        w_i = |s_i B_i A_i|_F / sum_j |s_j B_j A_j|_F    over all sites
        A <- sum_i w_i pad(A_i),   s B <- sum_i w_i pad(s_i B_i);      to rank r:  A[:r], B[:, :r]

    Rows that nobody trained in a round keep their value. ``prune`` (the paper's gamma < 1; 0.99 gives up one row at a
    time) lets a client give up the last rows: its loss gets ``penalty * |B[:, k:]| |A[k:]|`` per site, k = floor(gamma
    r), and where that product ends the round smaller than it began, the client's rank becomes max(1, k) for good. The
    paper states it for one adapter; here every site has its own rank.

    Travels: up, A and B at the client's rank; down, its slice; shared extras both ways. Stays: private extras, the
    pruned ranks. Paper: arXiv 2401.06432.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 2}, {}, (), width=3, alpha=2.0)
    >>> het = HetLoRA()
    >>> state = het.server_init(spec, seed=0)
    >>> state = het.server_update(state, {"q/A": torch.ones(1, 2).double(), "q/B": torch.ones(3, 1).double()}, round=1)
    >>> (het.broadcast(state, Client("a", {"q": 2}), round=2)["q/A"] == 1).all(1)   # nobody trained the second row
    tensor([ True, False])
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)
    prune: Share | None = None
    penalty: NotNegative = 1e-3

    @property
    def aggregator(self) -> Padded:
        return Padded()

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        return {
            "adapter": spec.adapter(spec.ranks, seed),
            "whole": self.extras.travelling(spec.start(seed)),
            "scaling": scaling(spec),
        }

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        return sliced(state["adapter"], client, state["scaling"]) | state["whole"]

    def client_update(self, payload: Tree, memory: Memory, local: Local) -> Work[tuple[Update, Memory]]:
        held: Mapping[str, int] = memory["ranks"] if memory else ranks(payload)
        begun = resize(payload, held)
        model = Model({**begun, **memory.get("private", {})})
        objective = cross_entropy if self.prune is None else Trailing(self.prune, self.penalty)
        train = trained(local.spec, self.extras, "A", "B")
        tuned = yield from self.training.fit(local, model, train, objective=objective)
        left = self.pruned(begun, tuned.params)
        arrays = resize(adapter(tuned.params), left) | difference(tuned.params, whole(payload))
        kept = {"ranks": left, "private": self.extras.staying(tuned.params)}
        return Update(arrays, local.examples, tuned.sums), kept

    def pruned(self, begun: Tree, tuned: Tree) -> dict[str, int]:
        """The ranks after a round's training."""
        held = ranks(tuned)
        if self.prune is None:
            return held
        smaller = {site for site in held if float(tail(tuned, site, self.prune)) < float(tail(begun, site, self.prune))}
        return {site: max(1, math.floor(self.prune * r)) if site in smaller else r for site, r in held.items()}

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        expected = shapes(self.broadcast(state, client, round))
        if self.prune is not None:  # only the client knows what it gave up
            for site in sites(state["adapter"]):
                right, left = state["adapter"][f"{site}/A"], state["adapter"][f"{site}/B"]
                expected |= {f"{site}/A": (-1, right.shape[1]), f"{site}/B": (left.shape[0], -1)}
        return expected

    def server_update(self, state: State, value: Tree, round: int) -> State:
        held = dict(state["adapter"])
        for site in sites(value):
            right, left = held[f"{site}/A"], held[f"{site}/B"]
            rank = value[f"{site}/A"].shape[0]
            new = value[f"{site}/B"] / held[f"{site}/scale"].double()
            held[f"{site}/A"] = torch.cat([value[f"{site}/A"].to(right.dtype), right[rank:]])
            held[f"{site}/B"] = torch.cat([new.to(left.dtype), left[:, rank:]], 1)
        return {**state, "adapter": held, "whole": add(state["whole"], whole(value))}

    def server_model(self, state: State) -> Model | None:
        return None if self.extras.personal else Model({**state["adapter"], **state["whole"]})

    def personalize(self, payload: Tree, memory: Memory, local: Local) -> Work[Mapping[str, Model]]:
        held: Mapping[str, int] = memory["ranks"] if memory else ranks(payload)
        own = resize(payload, held)
        name = "personal" if self.extras.personal else "truncated"
        return {name: Model({**own, **memory.get("private", {})})}
        yield


def tail(tree: Tree, site: str, share: float) -> Tensor:
    """|B[:, k:]| |A[k:]| with k = floor(share * r): what the last rows hold, 0-dim."""
    right, left = tree[f"{site}/A"], tree[f"{site}/B"]
    first = math.floor(share * right.shape[0])
    return linalg.vector_norm(right[first:]) * linalg.vector_norm(left[:, first:])


@dataclass(frozen=True)
class Trailing:
    """Cross-entropy plus the size of each site's last rows."""

    share: float
    penalty: float

    def __call__(self, outputs: Mapping[str, Outputs], params: Mapping[str, Tree], batch: Batch) -> Tensor:
        tree = params["model"]
        size = torch.stack([tail(tree, site, self.share) for site in sites(tree)]).sum()
        return cross_entropy(outputs, params, batch) + self.penalty * size


@dataclass(frozen=True)
class Padded:
    """sum_i w_i pad(A_i) / sum_i w_i and the same of s_i B_i, with w_i = |s_i B_i A_i|_F; whole parameters as in Mean.

    The report has as many rows as the largest participant whose change is not zero, and no sites where every product is
    zero: one that counts for nothing leaves the rows that nobody else has as they are.
    """

    streaming = True
    linear = False  # the weight is a norm of the update itself

    def zero(self) -> dict[str, Any]:
        return {"size": 0.0, "right": {}, "left": {}, "whole": Mean().zero()}

    def accumulate(self, acc: Mapping[str, Any], client: Client, update: Update) -> dict[str, Any]:
        size = frobenius(adapter(update.arrays))
        changed = sites(update.arrays) if size > 0 else []
        found = {site: factors(update.arrays, site, torch.float64) for site in changed}
        mine = {
            "size": size,
            "right": {site: size * right for site, (_, right) in found.items()},
            "left": {site: size * left for site, (left, _) in found.items()},
            "whole": Mean().accumulate(Mean().zero(), client, Update(whole(update.arrays), update.weight, {})),
        }
        return self.merge(acc, mine)

    def merge(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        def join(name: str) -> dict[str, Tensor]:
            both = {**a[name], **b[name]}
            return {s: overlaid(a[name][s], b[name][s]) if s in a[name] and s in b[name] else both[s] for s in both}

        return {
            "size": a["size"] + b["size"],
            "right": join("right"),
            "left": join("left"),
            "whole": Mean().merge(a["whole"], b["whole"]),
        }

    def report(self, acc: Mapping[str, Any]) -> dict[str, Tensor]:
        tree = Mean().report(acc["whole"])
        if acc["size"] > 0:
            for site in sorted(acc["right"]):
                tree[f"{site}/A"], tree[f"{site}/B"] = (acc[name][site] / acc["size"] for name in ("right", "left"))
        return tree


def overlaid(x: Tensor, y: Tensor) -> Tensor:
    """x + y, the smaller padded with zeros at its end."""
    rows, columns = (max(a, b) for a, b in zip(x.shape, y.shape))
    x, y = (functional.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0])) for t in (x, y))
    return x + y
