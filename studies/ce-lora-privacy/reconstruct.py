"""What CE-LoRA's uploads say of a client's texts, beside FedIT's: gradients of cores, and Gaussian mixtures of features.

python studies/ce-lora-privacy/reconstruct.py --data studies/data/medquad.parquet --out studies/ce-lora-privacy

Writes runs.csv (every trial) and table.md (means, 95 % t-intervals over trials) into the folder ``out``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from fedlora.adapters.inject import remove
from fedlora.algorithms.similarity import blurred, statistics
from fedlora.federation.client import Job
from fedlora.federation.orders import Fit, Model
from fedlora.federation.spec import Tree, derive, stream
from fedlora.learning.backbone import Backbone, load_backbone
from fedlora.study.config import load
from fedlora.study.experiment import Experiment, assemble

BASE = Path(__file__).parents[1] / "ce-lora-types" / "base.toml"
UPPER, ALL = (3, 4, 5), (0, 1, 2, 3, 4, 5)
SEEDS, VICTIMS, EACH = (0, 1, 2), 2, 4
WARM, LENGTH, POOL = 20, 8, 64
"""Local steps before the attack; tokens of a text, with [CLS] and [SEP]; candidates of the recognition test."""
RESTARTS, ITERATIONS, RATE, SWEEPS, CANDIDATES = 2, 120, 0.1, 2, 8
CHUNK = 96
"""Texts of one pass."""
Row = dict[str, Any]


class Factored(nn.Module):
    """A frozen layer with an adapter per lane, differentiable twice: W0 x + W x, or W0 x + s B C A x."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.own: Tree = {}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.own:
            return y
        z = x.reshape(len(next(iter(self.own.values()))), -1, x.shape[-1])
        if "W" in self.own:
            return y + (z @ self.own["W"].mT).view_as(y)
        u = z @ self.own["A"].mT
        u = u @ self.own["C"].mT if "C" in self.own else u
        return y + (self.own["scale"][:, None, None] * (u @ self.own["B"].mT)).view_as(y)


class Target:
    """MiniLM with ``Factored`` in place of every query and value layer."""

    def __init__(self, backbone: Backbone) -> None:
        self.module: Any = backbone.module
        remove(self.module)
        self.layers = {site: Factored(layer.base) for site, layer in backbone.sites.items()}
        for site, layer in self.layers.items():
            parent, _, name = site.rpartition(".")
            setattr(self.module.get_submodule(parent), name, layer)
        for part in self.module.modules():
            if hasattr(part, "config"):
                part.config._attn_implementation = "eager"  # the others cannot be differentiated twice
        self.words: Tensor = self.module.encoder.embeddings.word_embeddings.weight
        names: list[str] = backbone.processor.convert_ids_to_tokens(range(len(self.words)))
        self.usable = torch.tensor([i for i, name in enumerate(names) if not name.startswith("[")])

    def gradients(self, tree: Tree, seen: Sequence[str], x: Tensor, labels: Tensor, again: bool = False) -> list[Tensor]:
        """d loss / d factor per lane, of the factors that are seen. ``x`` (rows, tokens, width), the rows of a lane
        after each other; a lane's loss is the mean over its rows; ``tree``: every value with a first dimension of
        lanes; ``again``: to be differentiated."""
        leaves = {k: v.detach().requires_grad_() for k, v in tree.items() if k.rpartition("/")[2] in seen}
        for site, layer in self.layers.items():
            layer.own = {k.rpartition("/")[2]: leaves.get(k, v) for k, v in tree.items() if k.startswith(f"{site}/")}
        features = self.module(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.int64)).logits
        weight, bias = tree["head/weight"], tree["head/bias"]
        logits = features.view(len(weight), -1, features.shape[-1]) @ weight.mT + bias[:, None]
        losses = functional.cross_entropy(logits.mT, labels.view(len(weight), -1), reduction="none")
        return list(torch.autograd.grad(losses.mean(1).sum(), list(leaves.values()), create_graph=again))

    def nearest(self, x: Tensor) -> Tensor:
        """The usable token nearest by angle to each vector."""
        table = functional.normalize(self.words[self.usable], dim=-1)
        return self.usable[(functional.normalize(x, dim=-1) @ table.T).argmax(-1)]


def mismatch(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """1 - cosine per lane, mean over the gradients."""
    pairs = zip(found, wanted, strict=True)
    return torch.stack([1 - torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=1e-30) for a, b in pairs]).mean(0)


@dataclass(frozen=True, eq=False)
class Case:
    """What is attacked: texts (n, tokens) and labels, a model per text, the factors whose gradients the server sees,
    and the model that the attacker puts them into."""

    name: str
    layers: tuple[int, ...]
    seen: tuple[str, ...]
    tree: Tree
    guess: Tree


def repeated(tree: Tree, index: Tensor) -> dict[str, Tensor]:
    return {name: value[index] for name, value in tree.items()}


def distances(target: Target, case: Case, owner: Tensor, wanted: Sequence[Tensor], ids: Tensor, labels: Tensor) -> Tensor:
    """The mismatch of each candidate text (candidates, tokens); ``owner``: which text it is a candidate for."""
    out: list[Tensor] = []
    for own, tokens in zip(owner.split(CHUNK), ids.split(CHUNK), strict=True):
        tree = repeated(case.guess, own)
        found = target.gradients(tree, case.seen, target.words[tokens].detach(), labels[own])
        out.append(mismatch(found, [w[own] for w in wanted]))
    return torch.cat(out)


def optimised(target: Target, case: Case, wanted: Sequence[Tensor], ids: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Token embeddings by gradient matching, decoded to the nearest tokens, then exchanged one by one."""
    n, length = ids.shape
    owner = torch.arange(n).repeat_interleave(RESTARTS)
    tree, goal = repeated(case.guess, owner), [w[owner] for w in wanted]
    begun = torch.randint(len(target.usable), (n * RESTARTS, length - 2), generator=stream(seed, "begin"))
    free = target.words[target.usable[begun]].clone().requires_grad_()
    first, last = (target.words[ids[owner, end]].detach()[:, None] for end in (0, -1))
    optimizer = torch.optim.Adam([free], lr=RATE * float(target.words.std()))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ITERATIONS)
    for _ in range(ITERATIONS):
        x = torch.cat([first, free, last], 1)
        loss = mismatch(target.gradients(tree, case.seen, x, labels[owner], again=True), goal)
        (free.grad,) = torch.autograd.grad(loss.sum(), [free])
        optimizer.step()
        decay.step()
    decoded = ids[owner].clone()
    decoded[:, 1:-1] = target.nearest(free.detach())
    scores = distances(target, case, owner, wanted, decoded, labels).view(n, RESTARTS)
    best = decoded.view(n, RESTARTS, length)[torch.arange(n), scores.argmin(1)]
    return exchanged(target, case, wanted, best, scores.amin(1), labels)


def exchanged(
    target: Target, case: Case, wanted: Sequence[Tensor], ids: Tensor, least: Tensor, labels: Tensor
) -> Tensor:
    """One token at a time becomes the best of those that the mismatch's slope recommends, if it is better."""
    every = torch.arange(len(ids))
    owner = every.repeat_interleave(CANDIDATES)
    for place in [*range(1, ids.shape[1] - 1)] * SWEEPS:
        x = target.words[ids].detach().requires_grad_()
        loss = mismatch(target.gradients(case.guess, case.seen, x, labels, again=True), wanted)
        slope = torch.autograd.grad(loss.sum(), x)[0][:, place]
        offered = target.usable[(slope @ target.words[target.usable].T).topk(CANDIDATES, largest=False).indices]
        tried = ids[owner].clone()
        tried[:, place] = offered.flatten()
        found, which = distances(target, case, owner, wanted, tried, labels).view(-1, CANDIDATES).min(1)
        ids = ids.clone()
        ids[:, place] = torch.where(found < least, offered[every, which], ids[:, place])
        least = torch.minimum(found, least)
    return ids


def recalls(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """(share of the distinct true tokens that were found, share of places) between [CLS] and [SEP].
    ``found`` (tries, tokens), ``truth`` (texts, tokens)."""
    inner, guessed = truth[:, 1:-1], found[:, 1:-1]
    distinct = set(inner.flatten().tolist())
    places = (inner[:, None] == guessed[None]).any(1).float().mean()
    return len(distinct & set(guessed.flatten().tolist())) / len(distinct), float(places)


Test = tuple[Tensor | None, Tensor]
"""What an input of the first layer is mapped by (None: nothing), and orthonormal columns of the span it must be in."""


def tests(target: Target, case: Case, wanted: Mapping[str, Tensor], lane: int) -> list[Test]:
    """What the first layer's gradients say of its inputs x: rows of dA and dW are in the span of the x, those of dC in
    that of the A x, those of dB in that of the C A x."""
    found: list[Test] = []
    for name in case.seen:
        rows: list[Tensor] = []
        for site in (s for s in target.layers if ".layer.0." in s):
            gradient = wanted[f"{site}/{name}"][lane].double()
            rows.append(gradient / gradient.norm().clamp_min(1e-30))
            if name in ("B", "C"):
                own = {key: case.guess[f"{site}/{key}"][lane] for key in "AC" if f"{site}/{key}" in case.guess}
                found.append((own["C"] @ own["A"] if name == "B" and "C" in own else own["A"], basis(rows[-1])))
        if name in ("A", "W"):
            found.append((None, basis(torch.cat(rows))))
    return found


def spanned(target: Target, checks: Sequence[Sequence[Test]], length: int, tries: int) -> Tensor:
    """The usable tokens that are nearest to the spans, by place: (lanes, tries, length)."""
    found = torch.zeros(len(checks), tries, length, dtype=torch.int64)
    for place in range(length):
        x = target.module.encoder.embeddings(
            inputs_embeds=target.words[target.usable][:, None], position_ids=torch.tensor([[place]])
        )[:, 0]
        for lane, lanes_tests in enumerate(checks):
            outside = torch.zeros(len(x))
            for mapped, inside in lanes_tests:
                z = x if mapped is None else x @ mapped.T
                size = z.square().sum(1)
                outside += (size - (z @ inside).square().sum(1)) / size
            found[lane, :, place] = target.usable[outside.topk(tries, largest=False).indices]
    return found


def basis(rows: Tensor) -> Tensor:
    """Orthonormal columns that span the rows, as far as single precision tells."""
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    return right[sizes > 1e-5 * sizes[0].clamp_min(1e-30)].T.float()


# -- who is attacked


def trained(experiment: Experiment, client: str, tree: Tree, factors: Sequence[str]) -> dict[str, Tensor]:
    """A client's model after ``WARM`` steps of the project's own training."""
    training: Any = experiment.algorithm.training
    order = Fit(
        Model(tree),
        (*factors, "head"),
        steps=WARM,
        batch_size=training.batch_size,
        optimizer=training.optimizer,
        split="train",
    )
    ticket = experiment.learner.submit(Job(order, derive(experiment.config.seed, "warm", client), client))
    while not experiment.learner.idle:
        for done, tuned in experiment.learner.advance():
            if isinstance(tuned, Exception):
                raise tuned
            if done == ticket:
                return tuned.params
    raise RuntimeError("the training did not end")


@dataclass(frozen=True, eq=False)
class Seed:
    """One seed's attacked texts (n, 32), labels, owners, the trees of every owner by state, and other texts (m, 32)."""

    ids: Tensor
    labels: Tensor
    owners: list[int]
    trees: Mapping[tuple[str, tuple[int, ...]], list[dict[str, Tensor]]]
    others: Tensor


def prepared(experiment: Experiment, seed: int) -> Seed:
    """The first clients with enough long texts, no two of which begin alike."""
    store, learner = experiment.examples, experiment.learner
    begin: set[tuple[int, ...]] = set()
    chosen: list[tuple[str, list[int]]] = []
    rest: list[int] = []
    for client in experiment.population.seen:
        own: list[int] = []
        for unit in learner.units(client, "train").tolist():
            ids = tuple(store.padded(np.array([unit]))[0].tolist())
            if len(ids) == 32 and ids[1 : LENGTH - 1] not in begin:
                begin.add(ids[1 : LENGTH - 1])
                (own if len(chosen) < VICTIMS and len(own) < EACH else rest).append(unit)
        if len(own) == EACH:
            chosen.append((client, own))
    units = np.array([unit for _, own in chosen for unit in own])
    spec, names = experiment.spec, [name for name, _ in chosen]
    head, trees = spec.start(seed), {}
    for layers in (UPPER, ALL):
        wanted = tuple(f".{i}." for i in layers)
        starts: dict[str, Tree] = {
            "fedit": spec.adapter(spec.ranks, seed),
            "ce-lora": experiment.algorithm.begun(spec, seed),  # type: ignore[attr-defined]
        }
        for name, start in starts.items():
            tree = {k: v for k, v in start.items() if any(w in k for w in wanted)} | head
            factors = ("A", "B") if name == "fedit" else ("A", "B", "C")
            trees[f"{name}, start", layers] = [tree] * VICTIMS
            trees[f"{name}, trained", layers] = [trained(experiment, client, tree, factors) for client in names]
        dense = {f"{s}/W": torch.zeros(out, w) for s, (out, w) in spec.sites.items() if any(part in s for part in wanted)}
        trees["full, start", layers] = [dense | head] * VICTIMS
    owners = [i for i, (_, own) in enumerate(chosen) for _ in own]
    return Seed(store.padded(units), torch.from_numpy(store.labels[units]), owners, trees, store.padded(np.array(rest)))


def cases(seeds: Sequence[Seed]) -> Iterator[Case]:
    """What the server may see, and what it knows of the rest."""

    def stacked(state: str, layers: tuple[int, ...], other: bool = False) -> dict[str, Tensor]:
        own = [seed.trees[state, layers][(i + other) % VICTIMS] for seed in seeds for i in seed.owners]
        return {name: torch.stack([tree[name] for tree in own]) for name in own[0]}

    for layers in (UPPER, ALL):
        for name, state, seen in (
            ("full weights, start (control)", "full, start", ("W",)),
            ("FedIT, dA and dB, start", "fedit, start", ("A", "B")),
            ("FedIT, dA and dB, trained", "fedit, trained", ("A", "B")),
            ("CE-LoRA, dC, start", "ce-lora, start", ("C",)),
            ("CE-LoRA, dC, trained, A B head granted", "ce-lora, trained", ("C",)),
            ("CE-LoRA, dA and dB, trained, all granted", "ce-lora, trained", ("A", "B")),
        ):
            tree = stacked(state, layers)
            yield Case(name, layers, seen, tree, tree)
        tree = stacked("ce-lora, trained", layers)
        guess = stacked("ce-lora, trained", layers, other=True) | {k: v for k, v in tree.items() if k.endswith("/C")}
        yield Case("CE-LoRA, dC, trained, another client's A B head", layers, ("C",), tree, guess)
