"""CE-LoRA: tri-factor adapters whose cores are mixed per client (arXiv 2503.23869)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedlora.adapters.algebra import add, difference, linalg, mixture, part, ranks, shapes, whole
from fedlora.algorithms.merging import adapted, equal_ranks, trained
from fedlora.algorithms.similarity import (
    MEASURES,
    STATISTICS,
    blurred,
    data_similarity,
    distance,
    malformed,
    model_similarity,
    statistics,
)
from fedlora.errors import UserError
from fedlora.federation.aggregate import Collect
from fedlora.federation.algorithm import Algorithm, Kind, NotNegative, Positive, Share, Update, Whole
from fedlora.federation.orders import Features, Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree, stream

State = Mapping[str, Any]


@dataclass(frozen=True)
class CELoRA(Algorithm[State, Mapping[str, Any], Mapping[str, Any]]):
    """dW = s B C A: only the r x r core C travels, and every client gets its own mixture of all cores.

        C_i' = sum_j w_ij C_j,   w = rows of  lambda Sdata + (1 - lambda) Smodel,  normalised, self included
        Sdata = exp(-D / tau), D the square root of a two-level optimal transport between Gaussian mixtures of frozen
        features (one per class), sent once at introduction after a shared random projection; tau the median distance
        Smodel = linear CKA (or cosine) of C - I averaged over sites, min-max scaled over pairs, self 1

    Start: A ~ N(0, start_std^2) (None: PEFT's Kaiming-uniform), C = I, B = 0, the same on every side. C is exempt from
    weight decay, which would pull it to 0 and not to I. A newcomer without a core is mixed by Sdata alone. Equal ranks.

    To ablate: ``blend`` is lambda (1: data only, 0: model only); ``mixing = "uniform"`` gives every core the same
    weight, ``"own"`` mixes nothing; ``project = None`` sends statistics unprojected; ``noise`` adds Gaussian noise to
    means and sigmas, in units of the client's own feature deviation.

    ``bases = "frozen"`` is ours, not the paper's: A with orthonormal rows and B with orthonormal columns, drawn from
    the run's seed on every side, never trained, and C from 0. Then all cores are coordinates in one basis, their
    mixture is the mixture of the products, and C is all that a client learns. ``core_lr``: a learning rate of C's own.

    Travels: once, mixture weights, means, variances and class counts; then C, both ways, r^2 numbers a site; shared
    extras (n_i-weighted mean). Stays: A, B, private extras (default: the head). Deployed: "mixed" (the client's A and B
    around its mixture); variant "own" (around its last core). There is no single global model, so that whoever never
    trained deploys the start. The noise is drawn from the run's seed: it shows what noise costs, and hides nothing from
    who knows that seed. Paper: arXiv 2503.23869. Needs ``pip install 'fedlora[ce-lora]'``.

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
    blend: Share = 0.5
    similarity: Literal["cka", "cosine"] = "cka"
    mixing: Literal["similarity", "uniform", "own"] = "similarity"
    bases: Literal["private", "frozen"] = "private"
    project: Whole | None = 32
    noise: NotNegative = 0.0
    start_std: Positive | None = 1e-3
    core_lr: Positive | None = None

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
            a, b = tree[f"{site}/A"], tree[f"{site}/B"]
            if self.bases == "frozen":
                tree[f"{site}/A"] = orthonormal(a.T, seed, f"{site}/A").T.contiguous()
                tree[f"{site}/B"] = orthonormal(b, seed, f"{site}/B")
                tree[f"{site}/C"] = torch.zeros(rank, rank, dtype=spec.dtype)
                continue
            if self.start_std is not None:
                draw = torch.randn(a.shape, generator=stream(seed, site, "tri"), dtype=spec.dtype)
                tree[f"{site}/A"] = self.start_std * draw
            tree[f"{site}/C"] = torch.eye(rank, dtype=spec.dtype)
        return tree

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        adapted(spec)
        begun = self.begun(spec, seed)
        if (
            (self.similarity, self.mixing) == ("cka", "similarity")
            and self.blend < 1
            and min(ranks(begun).values()) < 4
        ):
            logging.getLogger(__name__).warning("CKA of cores below rank 4 says nothing; use similarity = 'cosine'")
        shared = self.extras.travelling(spec.start(seed))
        width = spec.width if self.project is None else min(spec.width, self.project)
        nobody: dict[str, Any] = {"statistics": {}, "cores": {}, "distances": {}, "weights": {}}
        return {"start": begun, "whole": shared, "width": width, "labels": max(1, len(spec.labels)), **nobody}

    def client_init(self, local: Local) -> Work[tuple[Update, Mapping[str, Any]]]:
        begun = self.begun(local.spec, local.run_seed)
        equal_ranks(begun, local.client, "ce-lora", "use flexlora")
        features, labels = yield from Features(Model({}), "train")
        if broken := int((~features.isfinite().all(1)).sum()):
            raise UserError(
                f"ce-lora: what the base says of {broken} of {len(features)} examples of client {local.client.id!r} is "
                "not finite",
                "look at these examples and the base's weights, or set [model] dtype to a wider type",
            )
        found = statistics(features, labels, self.project, local.run_seed)
        if self.noise:
            found = blurred(found, self.noise, local.seed("noise"))
        return Update(found, local.examples, {}), {"own": begun}

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
        given = self.training.optimizer
        lrs = given.lrs if self.core_lr is None else (*given.lrs, ("C", self.core_lr))
        optimizer = replace(given, no_decay=(*given.no_decay, "C"), lrs=lrs)
        training = replace(self.training, optimizer=optimizer)
        model = Model({**memory["own"], **payload})
        factors = ("C",) if self.bases == "frozen" else ("A", "B", "C")
        tuned = yield from training.fit(local, model, trained(local.spec, self.extras, *factors))
        arrays = part(tuned.params, ("C",)) | difference(tuned.params, whole(payload))
        return Update(arrays, local.examples, tuned.sums), {"own": tuned.params}

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        if kind == "introduce":
            return dict.fromkeys(STATISTICS)
        return shapes({**part(state["start"], ("C",)), **state["whole"]})

    def objection(self, state: State, client: Client, update: Update, kind: Kind) -> str | None:
        return malformed(update.arrays, state["width"], state["labels"]) if kind == "introduce" else None

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
        agree = model_similarity(cores, part(state["start"], ("C",)), MEASURES[self.similarity])

        def weight(i: str, j: str) -> float:
            if self.mixing == "uniform" or (self.mixing == "own" and i == j):
                return 1.0
            if self.mixing == "own" and i in cores:
                return 0.0
            return self.blend * near[i, j] + (1 - self.blend) * agree[i, j] if i in cores else near[i, j]

        weights: dict[str, dict[str, float]] = {}
        for i in names if senders else []:
            row = {j: weight(i, j) for j in senders}
            total = sum(row.values())  # 0: a newcomer so far from everybody that exp(-D / tau) is 0 for each
            weights[i] = {j: w / total if total else 1 / len(row) for j, w in row.items()}
        return {**state, "weights": weights}

    def personalize(self, payload: Tree, memory: Mapping[str, Any], local: Local) -> Work[Mapping[str, Model]]:
        return {"mixed": Model({**memory["own"], **payload}), "own": Model(memory["own"])}
        yield


def orthonormal(like: Tensor, seed: int, key: str) -> Tensor:
    """(n, r) with orthonormal columns, drawn from the seed; its shape and type are those of ``like``."""
    draw = torch.randn(like.shape, generator=stream(seed, key, "frozen"), dtype=torch.float64)
    q, upper = linalg.qr(draw)
    return (q * torch.sign(torch.diagonal(upper))).to(like.dtype)
