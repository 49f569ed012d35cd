"""Mixed ranks averaged row by row: what RBLA and replication padding share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.algebra import add, difference, factors, part, ranks, resize, sites, whole
from fedlora.algorithms.merging import scaling, sliced
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Update
from fedlora.federation.orders import Model
from fedlora.federation.spec import Client, Extras, ModelSpec, Tree

State = Mapping[str, Any]
Group = tuple[int, float, Tensor, Tensor]
"""(rank, weight, mean A (rank, in), mean s B (out, rank)) of the participants of one rank at a site."""
Rule = Callable[[list[Group]], tuple[Tensor, Tensor]]
"""Groups by rising rank -> (A, s B) at the largest of them."""


@dataclass(frozen=True)
class Rows:
    """Mixed ranks, averaged row by row (of A; column by column of s B) by a rule; zeros are never averaged in.

    Rows that nobody trained keep their value, and a client of rank r is served the first r. State: ``adapter`` at the
    largest ranks, ``whole``. Sent: differences from what was received, and the scales.
    """

    rule: Rule

    def init(self, spec: ModelSpec, seed: int, extras: Extras) -> State:
        first, rest = spec.adapter(spec.ranks, seed), extras.travelling(spec.start(seed))
        return {"adapter": first, "whole": rest, "scaling": scaling(spec)}

    def serve(self, state: State, client: Client) -> Tree:
        return sliced(state["adapter"], client, state["scaling"]) | state["whole"]

    def send(self, tuned: Tree, payload: Tree) -> dict[str, Tensor]:
        return difference(tuned, payload) | part(payload, ("scale",))

    def update(self, state: State, value: Mapping[str, Any]) -> State:
        held, change = state["adapter"], dict[str, Tensor]()
        for site, groups in value["sites"].items():
            right, left = self.rule(groups)
            change |= {f"{site}/A": right, f"{site}/B": left / held[f"{site}/scale"].double()}
        wide = resize(change, {site: rank for site, rank in ranks(held).items() if f"{site}/A" in change})
        return {**state, "adapter": add(held, wide), "whole": add(state["whole"], value["whole"])}

    def model(self, state: State) -> Model:
        return Model({**state["adapter"], **state["whole"]})


@dataclass(frozen=True)
class ByRank:
    """Means of A and of s B over the participants of each rank, per site; whole parameters as in Mean."""

    streaming = True
    linear = True

    def zero(self) -> dict[str, Any]:
        return {"sites": {}, "whole": Mean().zero()}

    def accumulate(self, acc: Mapping[str, Any], client: Client, update: Update) -> dict[str, Any]:
        weight, mine = float(update.weight), dict[str, Any]()
        for site in sites(update.arrays):
            left, right = factors(update.arrays, site, torch.float64)
            mine[site] = {str(len(right)): {"weight": weight, "A": weight * right, "B": weight * left}}
        rest = Mean().accumulate(Mean().zero(), client, Update(whole(update.arrays), weight, {}))
        return self.merge(acc, {"sites": mine, "whole": rest})

    def merge(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for site in sorted({**a["sites"], **b["sites"]}):
            one, two = a["sites"].get(site, {}), b["sites"].get(site, {})
            both = {rank: {name: one[rank][name] + two[rank][name] for name in one[rank]} for rank in {*one} & {*two}}
            merged[site] = {**one, **two, **both}
        return {"sites": merged, "whole": Mean().merge(a["whole"], b["whole"])}

    def report(self, acc: Mapping[str, Any]) -> dict[str, Any]:
        def groups(found: Mapping[str, Any]) -> list[Group]:
            means = [(int(r), g["weight"], g["A"] / g["weight"], g["B"] / g["weight"]) for r, g in found.items()]
            return sorted(means, key=lambda group: group[0])

        by_site = {site: groups(found) for site, found in acc["sites"].items()}
        return {"whole": Mean().report(acc["whole"]), "sites": by_site}
