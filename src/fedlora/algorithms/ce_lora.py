"""CE-LoRA: tri-factor adapters whose cores are mixed per client (arXiv 2503.23869)."""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.algebra import add, difference, linalg, mixture, part, ranks, shapes, whole
from fedlora.algorithms.merging import equal_ranks, trained
from fedlora.errors import UserError
from fedlora.federation.aggregate import Collect
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Features, Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree, derive, stream

State = Mapping[str, Any]
Pairs = Mapping[tuple[str, str], float]
STATISTICS = ("shares", "means", "variances", "class", "counts")


@dataclass(frozen=True)
class CELoRA(Algorithm[State, Mapping[str, Any], Mapping[str, Any]]):
    """dW = s B C A: only the r x r core C travels, and every client gets its own mixture of all cores.

        C_i' = sum_j w_ij C_j,   w = rows of  lambda Sdata + (1 - lambda) Smodel,  normalised, self included
        Sdata = exp(-D / tau), D the square root of a two-level optimal transport between Gaussian mixtures of frozen
        features (one per class), sent once at introduction after a shared random projection; tau the median distance
        Smodel = linear CKA (or cosine) of C - I averaged over sites, min-max scaled over pairs, self 1

    Start: A ~ N(0, start_std^2), C = I, B = 0, the same on every side. ``blend`` is lambda. C is exempt from weight
    decay, which would pull it to 0 and not to I. A newcomer without a core is mixed by Sdata alone. Equal ranks.

    Travels: once, mixture weights, means, variances and class counts; then C, both ways, r^2 numbers a site; shared
    extras (n_i-weighted mean). Stays: A, B, private extras (default: the head). There is no single global model. Paper:
    arXiv 2503.23869. Needs ``pip install 'fedlora[ce-lora]'``.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {}, (), width=3)
    >>> ce = CELoRA()
    >>> ce.broadcast(ce.server_init(spec, seed=0), Client("a", {"q": 1}), round=1)
    {'q/C': tensor([[1.]])}
    """

    given_start = False
    introduce_everyone: ClassVar[bool] = True

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=lambda: Extras(head="private"))
    blend: float = 0.5
    similarity: Literal["cka", "cosine"] = "cka"
    project: int = 32
    start_std: float = 1e-3

    @property
    def aggregator(self) -> Collect:
        return Collect()

    @property
    def introduction(self) -> Collect:
        return Collect()

    def begun(self, spec: ModelSpec, seed: int) -> dict[str, Tensor]:
        """The shared start of all three factors."""
        tree = spec.adapter(spec.ranks, seed)
        for site, rank in ranks(tree).items():
            draw = torch.randn(tree[f"{site}/A"].shape, generator=stream(seed, site, "tri"), dtype=spec.dtype)
            tree[f"{site}/A"] = self.start_std * draw
            tree[f"{site}/C"] = torch.eye(rank, dtype=spec.dtype)
        return tree

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        begun = self.begun(spec, seed)
        if self.similarity == "cka" and self.blend < 1 and min(ranks(begun).values()) < 4:
            logging.getLogger(__name__).warning("CKA of cores below rank 4 says nothing; use similarity = 'cosine'")
        shared = self.extras.travelling(spec.start(seed))
        return {"start": begun, "whole": shared, "statistics": {}, "cores": {}, "distances": {}, "weights": {}}

    def client_init(self, local: Local) -> Work[tuple[Update, Mapping[str, Any]]]:
        begun = self.begun(local.spec, local.run_seed)
        equal_ranks(begun, local.client, "ce-lora", "use flexlora")
        features, labels = yield from Features(Model({}), "train")
        return Update(statistics(features, labels, self.project, local.run_seed), local.examples, {}), {"own": begun}

    def server_introduce(self, state: State, value: Mapping[str, Any], round: int) -> State:
        known = state["statistics"] | {name: entry["arrays"] for name, entry in value.items()}
        distances, names = dict(state["distances"]), sorted(known)
        for i, j in ((i, j) for i in names for j in names if i < j and (i in value or j in value)):
            distances.setdefault(i, {})
            distances[i] = {**distances[i], j: distance(known[i], known[j])}
        return self.weighted({**state, "statistics": known, "distances": distances})

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        equal_ranks(state["start"], client, "ce-lora", "use flexlora")
        weights = state["weights"].get(client.id)  # None: nobody has sent a core yet, or a stranger is evaluated
        cores = mixture(state["cores"], weights) if weights else part(state["start"], ("C",))
        return {**cores, **state["whole"]}

    def client_update(
        self, payload: Tree, memory: Mapping[str, Any], local: Local
    ) -> Work[tuple[Update, Mapping[str, Any]]]:
        optimizer = replace(self.training.optimizer, no_decay=(*self.training.optimizer.no_decay, "C"))
        training = replace(self.training, optimizer=optimizer)
        model = Model({**memory["own"], **payload})
        tuned = yield from training.fit(local, model, trained(local.spec, self.extras, "A", "B", "C"))
        arrays = part(tuned.params, ("C",)) | difference(tuned.params, whole(payload))
        return Update(arrays, local.examples, tuned.sums), {"own": tuned.params}

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        if kind == "introduce":
            return dict.fromkeys(STATISTICS)
        return shapes({**part(state["start"], ("C",)), **state["whole"]})

    def server_update(self, state: State, value: Mapping[str, Any], round: int) -> State:
        sent = {name: entry["arrays"] for name, entry in value.items()}
        total = sum(entry["weight"] for entry in value.values())
        change = mixture(
            {name: whole(tree) for name, tree in sent.items()}, {n: value[n]["weight"] / total for n in sent}
        )
        cores = state["cores"] | {name: part(tree, ("C",)) for name, tree in sent.items()}
        return self.weighted({**state, "cores": cores, "whole": add(state["whole"], change)})

    def weighted(self, state: State) -> State:
        """One mixture per client seen, over the clients that have sent a core."""
        cores, names = state["cores"], sorted(state["statistics"])
        senders = sorted(cores)
        near = data_similarity(names, state["distances"])
        agree = model_similarity(cores, MEASURES[self.similarity])
        weights: dict[str, dict[str, float]] = {}
        for i in names if senders else []:
            row = {
                j: self.blend * near[i, j] + (1 - self.blend) * agree[i, j] if i in cores else near[i, j]
                for j in senders
            }
            weights[i] = {j: w / sum(row.values()) for j, w in row.items()}
        return {**state, "weights": weights}

    def personalize(self, payload: Tree, memory: Mapping[str, Any], local: Local) -> Work[Mapping[str, Model]]:
        return {"mixed": Model({**memory["own"], **payload}), "own": Model(memory["own"])}
        yield


def statistics(features: Tensor, labels: Tensor, project: int, seed: int) -> dict[str, Tensor]:
    """One Gaussian mixture per class with at least two examples; else one Gaussian over everything.

    ``features`` (examples, width), ``labels`` (examples,), or (examples, tokens), which count as one class. Returns the
    components of all classes: shares (k,), means (k, d), variances (k, d), class (k,), counts (k,) of the class.
    """
    sklearn: Any = importlib.import_module("sklearn.mixture")  # slow to import, and only needed here
    x = features.double()
    if x.shape[1] > project:
        draw = torch.randn(x.shape[1], project, generator=stream(seed, "projection"), dtype=torch.float64)
        x = x @ draw / math.sqrt(project)
    found = labels if labels.dim() == 1 else torch.zeros(len(x), dtype=torch.int64)
    present = [c for c in classes(found) if int((found == c).sum()) >= 2]
    groups = [(c, x[found == c]) for c in present] or [(-1, x)]
    parts: dict[str, list[Any]] = {name: [] for name in STATISTICS}
    for c, rows in groups:
        components = max(1, min(3, len(rows) // 10))
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
    return float(ot.emd2(a, b, np.ascontiguousarray(cost)))


def distance(a: Tree, b: Tree) -> float:
    """D between two clients: the square root of the transport between their classes, any class to any class, whose cost
    is the transport between the classes' mixtures, whose cost is ``|m - m'|^2 + sum (sigma - sigma')^2``."""
    sigma_a, sigma_b = a["variances"].sqrt(), b["variances"].sqrt()
    cost = (a["means"][:, None] - b["means"]).square().sum(-1) + (sigma_a[:, None] - sigma_b).square().sum(-1)
    classes_a, classes_b = (classes(t["class"]) for t in (a, b))
    between = np.zeros((len(classes_a), len(classes_b)))
    for i, p in enumerate(classes_a):
        for j, q in enumerate(classes_b):
            rows, columns = a["class"] == p, b["class"] == q
            shares_a, shares_b = a["shares"][rows].numpy(), b["shares"][columns].numpy()
            between[i, j] = transport(shares_a, shares_b, cost[rows][:, columns].numpy())
    mass_a = np.array([float(a["counts"][a["class"] == c][0]) for c in classes_a])
    mass_b = np.array([float(b["counts"][b["class"] == c][0]) for c in classes_b])
    return math.sqrt(max(0.0, transport(mass_a / mass_a.sum(), mass_b / mass_b.sum(), between)))


def data_similarity(names: list[str], distances: Mapping[str, Mapping[str, float]]) -> Pairs:
    """exp(-D / tau), tau the median non-zero distance; self 1."""
    positive = [d for row in distances.values() for d in row.values() if d > 0]
    tau = float(np.median(positive)) if positive else 1.0
    return {(i, j): 1.0 if i == j else math.exp(-distances[min(i, j)][max(i, j)] / tau) for i in names for j in names}


def model_similarity(cores: Mapping[str, Tree], measure: Any) -> Pairs:
    """The measure of C - I, averaged over sites; min-max over pairs, a constant becomes 0.5; self 1."""
    moved = {
        name: [c.double() - torch.eye(len(c), dtype=torch.float64) for _, c in sorted(tree.items())]
        for name, tree in cores.items()
    }
    raw = {(i, j): sum(map(measure, moved[i], moved[j])) / len(moved[i]) for i in cores for j in cores if i < j}
    low, high = (min(raw.values()), max(raw.values())) if raw else (0.0, 0.0)
    scaled = {pair: (v - low) / (high - low) if high > low else 0.5 for pair, v in raw.items()}
    return {(i, j): 1.0 if i == j else scaled[min(i, j), max(i, j)] for i in cores for j in cores}


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two matrices; 0 where either has hardly moved."""
    if min(float(linalg.norm(x)), float(linalg.norm(y))) < 1e-8:
        return 0.0
    x, y = x - x.mean(0), y - y.mean(0)
    below = float(linalg.norm(x.T @ x) * linalg.norm(y.T @ y))
    return float((x.T @ y).square().sum()) / below if below > 0 else 0.0


def cosine(x: Tensor, y: Tensor) -> float:
    """The cosine of two matrices as vectors (it sees opposite signs); 0 where either has hardly moved."""
    size = float(linalg.norm(x)), float(linalg.norm(y))
    return 0.0 if min(size) < 1e-8 else float((x * y).sum()) / (size[0] * size[1])


MEASURES = {"cka": cka, "cosine": cosine}
