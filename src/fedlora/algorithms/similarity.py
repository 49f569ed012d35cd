"""How alike clients are (arXiv 2503.23869): by mixtures of their features, and by what their cores learnt."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.algebra import linalg
from fedlora.errors import UserError
from fedlora.federation.spec import Tree, derive, stream

Pairs = Mapping[tuple[str, str], float]
Measure = Callable[[Tensor], Tensor]
"""(clients, r, r) matrices -> how alike each two are, (clients, clients)."""
COMPONENTS = 3
"""Of a class, at most."""
ROUNDING = 1e-6
"""Differences of similarities, and shares of distances, that say nothing."""
STATISTICS = ("shares", "means", "variances", "class", "counts")


def statistics(features: Tensor, labels: Tensor, project: int | None, seed: int) -> dict[str, Tensor]:
    """One Gaussian mixture per class with at least two examples; else one Gaussian over everything.

    ``features`` (examples, width), ``labels`` (examples,), or (examples, tokens), which count as one class. Returns the
    components of all classes: shares (k,), means (k, d), variances (k, d), class (k,), counts (k,) of the class.
    """
    sklearn: Any = importlib.import_module("sklearn.mixture")  # slow to import, and only needed here
    x = features.double()
    if project is not None and x.shape[1] > project:
        draw = torch.randn(x.shape[1], project, generator=stream(seed, "projection"), dtype=torch.float64)
        x = x @ draw / math.sqrt(project)
    found = labels if labels.dim() == 1 else torch.zeros(len(x), dtype=torch.int64)
    present = [c for c in classes(found) if int((found == c).sum()) >= 2]
    groups = [(c, x[found == c]) for c in present] or [(-1, x)]
    parts: dict[str, list[Any]] = {name: [] for name in STATISTICS}
    for c, rows in groups:
        components = max(1, min(COMPONENTS, len(rows) // 10))
        if len(rows) > 1:
            seeded = derive(seed, c) % 2**32
            fitted = sklearn.GaussianMixture(components, covariance_type="diag", reg_covar=1e-4, random_state=seeded)
            with warnings.catch_warnings():  # fewer distinct points than components, or no convergence: usable anyway
                warnings.simplefilter("ignore")
                fitted.fit(rows.numpy())
            shares, means, variances = fitted.weights_, fitted.means_, fitted.covariances_
        else:
            shares, means, variances = np.ones(1), rows.numpy(), np.full((1, x.shape[1]), 1e-4)
        parts["shares"].append(shares)
        parts["means"].append(means)
        parts["variances"].append(variances)
        parts["class"].append(np.full(components, c))
        parts["counts"].append(np.full(components, len(rows)))
    return {name: torch.tensor(np.concatenate(pieces)) for name, pieces in parts.items()}


def malformed(found: Tree, width: int, labels: int) -> str | None:
    """Why a stranger's statistics are none, or None: sizes that agree, Gaussians of ``width`` features, not more than
    ``labels`` classes can have, and per class shares that sum to one and one positive count.

    >>> good = statistics(torch.randn(40, 5), torch.arange(40) % 3, None, 0)
    >>> malformed(good, 5, 3), malformed({**good, "variances": -good["variances"]}, 5, 3)
    (None, 'variances is not positive')
    """
    k = found["class"].numel()
    if k > COMPONENTS * labels:
        return f"{k} components, where {labels} classes have at most {COMPONENTS} each"
    shapes = {"shares": (k,), "means": (k, width), "variances": (k, width), "class": (k,), "counts": (k,)}
    for name, shape in shapes.items():
        whole = name in ("class", "counts")
        if not k or tuple(found[name].shape) != shape:
            return f"{name} has shape {tuple(found[name].shape)}, not {shape} of at least one component"
        if found[name].dtype != (torch.int64 if whole else torch.float64):
            return f"{name} has type {found[name].dtype}"
    for name in ("shares", "variances", "counts"):
        if not bool((found[name] > 0).all()):
            return f"{name} is not positive"
    for c in classes(found["class"]):
        own = found["class"] == c
        if abs(float(found["shares"][own].sum()) - 1) > 1e-6 or len(classes(found["counts"][own])) > 1:
            return f"class {c}: its shares do not sum to 1, or its components disagree on the count"
    return None


def blurred(found: Tree, noise: float, seed: int) -> dict[str, Tensor]:
    """Mixtures with Gaussian noise on means and sigmas: ``noise`` times the deviation of the mixture of everything,
    so that it does not depend on the units of the features."""
    shares = (found["shares"] * found["counts"])[:, None]
    shares = shares / shares.sum()
    centre = (shares * found["means"]).sum(0)
    spread = (shares * (found["variances"] + (found["means"] - centre).square())).sum(0).mean().sqrt()
    generator = stream(seed, "blur")
    draws = torch.randn(2, *found["means"].shape, generator=generator, dtype=torch.float64) * noise * spread
    sigmas = (found["variances"].sqrt() + draws[1]).abs().clamp_min(1e-6)
    return {**found, "means": found["means"] + draws[0], "variances": sigmas.square()}


def classes(labels: Tensor) -> list[int]:
    """The distinct values, sorted."""
    return [int(c) for c in np.unique(labels.numpy())]


def transport(a: Any, b: Any, cost: Any) -> float:
    """The value of the optimal transport between two weightings."""
    try:
        ot: Any = importlib.import_module("ot")
    except ImportError as error:
        raise UserError(
            "ce-lora compares clients with POT, which is not installed", "pip install 'fedlora[ce-lora]'"
        ) from error
    if 1 in cost.shape:  # there is one plan only: classes of few examples have one component
        return float(a @ cost @ b)
    fast = {"check_marginals": False, "center_dual": False}  # checks of what is checked, and what is not read
    return float(ot.emd2(a, b, np.ascontiguousarray(cost), **fast))


def distance(a: Tree, b: Tree) -> float:
    """D between two clients: the square root of the transport between their classes, any class to any class, whose cost
    is the transport between the classes' mixtures, whose cost is ``|m - m'|^2 + sum (sigma - sigma')^2``."""
    sigma_a, sigma_b = a["variances"].sqrt(), b["variances"].sqrt()
    cost: Any = (a["means"][:, None] - b["means"]).square().sum(-1) + (sigma_a[:, None] - sigma_b).square().sum(-1)
    cost = cost.numpy()
    (rows, shares_a, mass_a), (columns, shares_b, mass_b) = _by_class(a), _by_class(b)
    between = np.array(
        [
            [transport(p, q, cost[own][:, others]) for others, q in zip(columns, shares_b, strict=True)]
            for own, p in zip(rows, shares_a, strict=True)
        ]
    )
    return math.sqrt(max(0.0, transport(mass_a, mass_b, between)))


def _by_class(found: Tree) -> tuple[list[Any], list[Any], Any]:
    """Of every class: its components' numbers and shares; and the classes' shares of all examples."""
    labels, shares = found["class"].numpy(), found["shares"].numpy()
    rows = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    counts = found["counts"].numpy()[[own[0] for own in rows]].astype(np.float64)
    return rows, [shares[own] for own in rows], counts / counts.sum()


def data_similarity(names: list[str], distances: Mapping[str, Mapping[str, float]]) -> Pairs:
    """exp(-D / tau), tau the median non-zero distance; self 1. What is 1e-6 of the largest is rounding."""
    every = np.array([d for row in distances.values() for d in row.values()])
    positive = every[every > ROUNDING * every.max(initial=0.0)]
    tau = float(np.median(positive)) if len(positive) else 1.0
    return {(i, j): 1.0 if i == j else math.exp(-distances[min(i, j)][max(i, j)] / tau) for i in names for j in names}


def model_similarity(cores: Mapping[str, Tree], begun: Tree, measure: Measure) -> Pairs:
    """The measure of C minus its start (I), averaged over sites; min-max over pairs, what differs by rounding
    becomes 0.5; self 1."""
    names, sites = sorted(cores), sorted(begun)
    if not names:
        return {}
    moved = (torch.stack([cores[n][site].double() for n in names]) - begun[site].double() for site in sites)
    raw = torch.stack([measure(site) for site in moved]).mean(0)
    above = torch.ones_like(raw, dtype=torch.bool).triu(1)
    low, high = raw[above].aminmax() if len(names) > 1 else (raw.new_zeros(()), raw.new_zeros(()))
    scaled = ((raw - low) / (high - low) if high - low > ROUNDING else torch.full_like(raw, 0.5)) * above
    whole: Any = (scaled + scaled.T).fill_diagonal_(1.0)
    table: list[list[float]] = whole.tolist()
    return {(i, j): value for i, row in zip(names, table) for j, value in zip(names, row)}


def unit(matrices: Tensor) -> Tensor:
    """(clients, r, r), each of norm 1; 0 where one has hardly moved."""
    size = linalg.norm(matrices.flatten(1), dim=1)
    return matrices / size.masked_fill(size < 1e-8, math.inf)[:, None, None]


def cosine(matrices: Tensor) -> Tensor:
    """(clients, clients) cosines of (clients, r, r) matrices as vectors (it sees opposite signs)."""
    flat = unit(matrices).flatten(1)
    return flat @ flat.T


def cka(matrices: Tensor) -> Tensor:
    """(clients, clients) linear CKA: ``|X'Y|^2 / (|X'X| |Y'Y|)`` of centred X and Y is the cosine of XX' and YY', so
    that all pairs are one product."""
    x = unit(matrices)
    x = unit(x - x.mean(1, keepdim=True))
    return cosine(x @ x.mT)


MEASURES: Mapping[str, Measure] = {"cka": cka, "cosine": cosine}
