"""Ways to combine updates. Accumulators are plain values; sums are float64.

``accumulate`` and ``merge`` change nothing that they are given: a result may share tensors with its inputs, so nobody
writes into an accumulator. The time of a fold is linear in the number of clients, and where ``streaming`` holds, its
memory is that of one accumulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.algebra import sites, unscaled, whole
from fedlora.federation.algorithm import Update
from fedlora.federation.spec import Client

WIDE = 128
"""Columns from which a product is as fast alone as with others beside it."""
NOTHING: Mapping[str, Any] = {"left": [], "right": [], "scale": [], "held": 0}
"""The factors that wait at a site: none."""


@dataclass(frozen=True)
class Mean:
    """sum_i w_i x_i / sum_i w_i, per name, over those who sent it. Used on differences.

    >>> one, two = (Update({"x": torch.tensor([v])}, w, {}) for v, w in ((1.0, 3.0), (5.0, 1.0)))
    >>> mean, who = Mean(), Client("a", {})
    >>> mean.report(mean.accumulate(mean.accumulate(mean.zero(), who, one), who, two))
    {'x': tensor([2.], dtype=torch.float64)}
    """

    streaming = True
    linear = True

    def zero(self) -> dict[str, Any]:
        return {"sum": {}, "weight": {}}

    def accumulate(self, acc: Mapping[str, Any], client: Client, update: Update) -> dict[str, Any]:
        sums, weights, weight = dict(acc["sum"]), dict(acc["weight"]), float(update.weight)
        for key, value in update.arrays.items():
            known = key in sums  # what is added is widened on the way: no copy of it is made
            sums[key] = torch.add(sums[key], value, alpha=weight) if known else value.double() * weight
            weights[key] = weights.get(key, 0.0) + weight
        return {"sum": sums, "weight": weights}

    def merge(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _union(a[name], b[name]) for name in ("sum", "weight")}

    def report(self, acc: Mapping[str, Any]) -> dict[str, Tensor]:
        return {key: total / acc["weight"][key] for key, total in sorted(acc["sum"].items())}


def _union(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    both = {**a, **b}
    return {key: a[key] + b[key] if key in a and key in b else both[key] for key in sorted(both)}


@dataclass(frozen=True)
class Products:
    """sum_i p_i s_i B_i C_i A_i per site, exact, never mixing factors of two clients; whole parameters as in Mean.

    A site is kept as factors B_i, C_i A_i and scales w_i s_i while those are smaller than their product, and as the
    product from then on (always, with ``dense``). What comes later waits as factors, up to as many numbers, and is then
    added in few multiplications: few columns at a time would mostly move memory. So memory is bounded by two dense
    sums.
    ``wide``: in float64; otherwise in the updates' own type, at least float32.

    The report is a tree either way: ``site/A, site/B, site/scale = 1``, or ``site/W``.
    """

    dense: bool = False
    wide: bool = True
    streaming = True
    linear = True  # in the lifted update s B C A

    def zero(self) -> dict[str, Any]:
        return {"weight": 0.0, "sites": {}, "whole": Mean().zero()}

    def accumulate(self, acc: Mapping[str, Any], client: Client, update: Update) -> dict[str, Any]:
        weight, found = float(update.weight), dict(acc["sites"])
        for site in sites(update.arrays):
            if f"{site}/W" in update.arrays:
                change = update.arrays[f"{site}/W"]
                total = weight * change.to(self.dtype(change))
                mine: dict[str, Any] = {**NOTHING, "sum": total}
            else:
                left, right, scale = unscaled(update.arrays, site, self.dtype(update.arrays[f"{site}/A"]))
                held = left.numel() + right.numel()
                mine = {"left": [left], "right": [right], "scale": [weight * float(scale)], "held": held}
            found[site] = self.join(found[site], mine) if site in found else self.settle(mine)
        rest = Mean().accumulate(acc["whole"], client, Update(whole(update.arrays), update.weight, {}))
        return {"weight": acc["weight"] + weight, "sites": found, "whole": rest}

    def dtype(self, value: Tensor) -> torch.dtype:
        """The type that a site is summed in."""
        return torch.float64 if self.wide else torch.promote_types(value.dtype, torch.float32)

    def join(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        """The sum of two sites' accumulators."""
        both = {name: a[name] + b[name] for name in NOTHING}
        if sums := [one["sum"] for one in (a, b) if "sum" in one]:
            both["sum"] = sums[0] if len(sums) == 1 else sums[0] + sums[1]
        return self.settle(both)

    def settle(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Factors while they are few."""
        if not found["left"]:
            return dict(found)
        size = found["left"][0].shape[0] * found["right"][0].shape[1]
        if not self.dense and found["held"] < size:
            return dict(found)
        return {**NOTHING, "sum": self.total(found)}

    def total(self, found: Mapping[str, Any], weight: float = 1.0) -> Tensor:
        """The dense sum over the weight."""
        if not found["left"]:
            return found["sum"] / weight
        (left, right, scale), *more = _few(found)
        if "sum" in found:
            out = torch.addmm(found["sum"], left, right, beta=1 / weight, alpha=scale / weight)
        else:
            out = (left @ right).mul_(scale / weight)
        for left, right, scale in more:
            out.addmm_(left, right, alpha=scale / weight)
        return out

    def merge(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        both = {**a["sites"], **b["sites"]}
        found = {
            site: self.join(a["sites"][site], b["sites"][site]) if site in a["sites"] and site in b["sites"] else one
            for site, one in sorted(both.items())
        }
        return {"weight": a["weight"] + b["weight"], "sites": found, "whole": Mean().merge(a["whole"], b["whole"])}

    def report(self, acc: Mapping[str, Any]) -> dict[str, Tensor]:
        tree = Mean().report(acc["whole"])
        for site, found in sorted(acc["sites"].items()):
            if "sum" in found:
                tree[f"{site}/W"] = self.total(found, acc["weight"])
            else:
                left, tree[f"{site}/A"] = _beside(_terms(found))
                tree[f"{site}/B"] = left / acc["weight"]
                tree[f"{site}/scale"] = torch.ones((), dtype=tree[f"{site}/A"].dtype)
        return tree


Term = tuple[Tensor, Tensor, float]
"""(left, right, scale): scale * left @ right."""


def _terms(found: Mapping[str, Any]) -> list[Term]:
    return list(zip(found["left"], found["right"], found["scale"], strict=True))


def _few(found: Mapping[str, Any]) -> list[Term]:
    """What waits, in few products: narrow factors side by side, wide ones as they are, for whose products copies would
    only be work."""
    terms = _terms(found)
    wide = [term for term in terms if term[0].shape[1] >= WIDE]
    narrow = [term for term in terms if term[0].shape[1] < WIDE]
    return [*wide, (*_beside(narrow), 1.0)] if narrow else wide


def _beside(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Their sum as one product: scaled lefts side by side, rights below each other."""
    return torch.cat([left * scale for left, _, scale in terms], 1), torch.cat([right for _, right, _ in terms])


@dataclass(frozen=True)
class Collect:
    """Every update by client id, ``{id: {"arrays", "weight"}}``: for servers that treat clients apart."""

    streaming = False
    linear = False

    def zero(self) -> dict[str, Any]:
        return {}

    def accumulate(self, acc: Mapping[str, Any], client: Client, update: Update) -> dict[str, Any]:
        return self.merge(acc, {client.id: {"arrays": dict(update.arrays), "weight": float(update.weight)}})

    def merge(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        if twice := set(a) & set(b):
            raise ValueError(f"folded twice: {sorted(twice)}")
        return {**a, **b}

    def report(self, acc: Mapping[str, Any]) -> dict[str, Any]:
        return dict(sorted(acc.items()))
