"""Pure functions on trees: differences, low-rank products, rank changes. (Truncated SVD: ``lowrank``.)

Nothing here changes its inputs; results may share tensors with them. A site's change of its base weight is
``dW = s B C A`` (C only where there is one) or ``W``, (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedlora.federation.spec import Shape, Tree, stream

FACTORS = ("A", "B", "C", "W", "scale")
linalg: Any = torch.linalg  # untyped in torch


def sites(tree: Tree) -> list[str]:
    """The sites a tree changes, by factors or densely, sorted."""
    return list(_sites(tuple(tree)))


@lru_cache(maxsize=256)  # clients' trees have the same names, round after round
def _sites(names: tuple[str, ...]) -> tuple[str, ...]:
    changed = (key for key in names if key.endswith(("/A", "/W")) and not key.startswith("extra/"))
    return tuple(sorted({key.rsplit("/", 1)[0] for key in changed}))


def ranks(tree: Tree) -> dict[str, int]:
    """The rank of every factored site."""
    return {site: tree[f"{site}/A"].shape[0] for site in sites(tree) if f"{site}/A" in tree}


def part(tree: Tree, factors: Iterable[str]) -> dict[str, Tensor]:
    """The sites' entries whose last name is one of the factors."""
    wanted = tuple(factors)
    return {key: value for key, value in adapter(tree).items() if key.rsplit("/", 1)[-1] in wanted}


def whole(tree: Tree) -> dict[str, Tensor]:
    """The entries that belong to no site."""
    return {key: value for key, value in tree.items() if not _factor(key)}


def adapter(tree: Tree) -> dict[str, Tensor]:
    """The entries that belong to a site: factors, dense changes and scales."""
    return {key: value for key, value in tree.items() if _factor(key)}


def _factor(key: str) -> bool:
    return key.rsplit("/", 1)[-1] in FACTORS and not key.startswith("extra/")


def difference(new: Tree, old: Tree) -> dict[str, Tensor]:
    """new - old over old's names, without scales: a scale belongs to the adapter and is never averaged."""
    return {key: new[key] - value for key, value in old.items() if not key.endswith("/scale")}


def add(tree: Tree, change: Tree, factor: float = 1.0) -> dict[str, Tensor]:
    """tree + factor * change, computed in the wider type, returned in tree's; an unknown name is a KeyError.

    >>> add({"head/bias": torch.ones(2)}, {"head/bias": torch.ones(2).double()}, -0.5)["head/bias"]
    tensor([0.5000, 0.5000])
    """
    if missing := set(change) - set(tree):
        raise KeyError(f"no such parameters: {sorted(missing)}")
    return {
        key: (value + factor * change[key]).to(value.dtype) if key in change else value.clone()
        for key, value in tree.items()
    }


def cast(tree: Tree, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every entry in one type: aggregators report float64, what is served or stored is in the spec's."""
    return {key: value.to(dtype) for key, value in tree.items()}


def zeros(tree: Tree) -> dict[str, Tensor]:
    """Zeros of the same shapes and types, without scales."""
    return {key: torch.zeros_like(value) for key, value in tree.items() if not key.endswith("/scale")}


def unscaled(tree: Tree, site: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(B, C A, s) of a factored site: (out, r), (r, in), (); in ``dtype`` where one is given."""
    entries = {name: tree[f"{site}/{name}"].to(dtype) for name in ("A", "B", "C", "scale") if f"{site}/{name}" in tree}
    right = entries["C"] @ entries["A"] if "C" in entries else entries["A"]
    return entries["B"], right, entries["scale"]


def factors(tree: Tree, site: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(s B, C A) of a factored site: (out, r), (r, in); computed in ``dtype`` where one is given."""
    left, right, scale = unscaled(tree, site, dtype)
    return left * scale, right


def product(tree: Tree, site: str) -> Tensor:
    """dW of one site: W, or s B C A; (out, in)."""
    if f"{site}/W" in tree:
        return tree[f"{site}/W"]
    left, right = factors(tree, site)
    return left @ right


def frobenius(tree: Tree) -> float:
    """The Frobenius norm of all sites' dW together, from the factors' Gram matrices where they are smaller."""
    total = 0.0
    for site in sites(tree):
        if f"{site}/W" in tree:
            total += float(tree[f"{site}/W"].double().square().sum())
        else:
            left, right = factors(tree, site, torch.float64)
            total += max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
    return math.sqrt(total)


def resize(tree: Tree, ranks: Mapping[str, int], seed: int | None = None) -> dict[str, Tensor]:
    """The adapter at other ranks: prefixes of larger ones; smaller ones padded with zeros. Scales stay.

    With a seed, rows that are dead (zero in A and in B's column: they would never train) get rows of A drawn as an
    adapter's start, Kaiming-uniform with bound 1/sqrt(in), and where there is a C, ones on its diagonal; dW stays.
    """
    changed = dict(tree)
    for site, rank in ranks.items():
        right, left, core = tree[f"{site}/A"], tree[f"{site}/B"], tree.get(f"{site}/C")
        more = max(0, rank - right.shape[0])
        right, left = functional.pad(right[:rank], (0, 0, 0, more)), functional.pad(left[:, :rank], (0, more))
        if core is not None:
            core = functional.pad(core[:rank, :rank], (0, more, 0, more))
        if seed is not None:
            dead = (right == 0).all(1) & (left == 0).all(0)
            draw = torch.rand(right.shape, generator=stream(seed, site, "resize"), dtype=right.dtype)
            right = torch.where(dead[:, None], (2 * draw - 1) / math.sqrt(right.shape[1]), right)
            if core is not None:
                core = core + torch.diag((dead & (core == 0).all(1) & (core == 0).all(0)).to(core.dtype))
        changed[f"{site}/A"], changed[f"{site}/B"] = right, left
        if core is not None:
            changed[f"{site}/C"] = core
    return changed


def stack(trees: Sequence[Tree], shares: Sequence[float]) -> dict[str, Tensor]:
    """One adapter of scale 1 whose dW is exactly sum_i share_i s_i B_i C_i A_i; its rank is the sum of ranks."""
    stacked: dict[str, Tensor] = {}
    for site in sorted({site for tree in trees for site in ranks(tree)}):
        pairs = [
            (share, *factors(tree, site)) for tree, share in zip(trees, shares, strict=True) if f"{site}/A" in tree
        ]
        stacked[f"{site}/A"] = torch.cat([right for _, _, right in pairs])
        stacked[f"{site}/B"] = torch.cat([share * left for share, left, _ in pairs], 1)
        stacked[f"{site}/scale"] = torch.ones((), dtype=stacked[f"{site}/B"].dtype)
    return stacked


def mixture(trees: Mapping[str, Tree], shares: Mapping[str, float]) -> dict[str, Tensor]:
    """sum_i share_i * tree_i in the order of names, summed in float64, in the trees' type."""
    names = sorted(shares)
    mixed: dict[str, Tensor] = {}
    for key, value in trees[names[0]].items():
        total = torch.zeros_like(value, dtype=torch.float64)
        for name in names:
            total = torch.add(total, trees[name][key].double(), alpha=shares[name])
        mixed[key] = total.to(value.dtype)
    return mixed


def shapes(tree: Tree) -> dict[str, Shape | None]:
    """The names and shapes of a tree, as ``Algorithm.expects`` states them."""
    return {key: tuple(value.shape) for key, value in tree.items()}
