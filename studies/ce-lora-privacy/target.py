"""The attacked model, differentiable twice, and what an attacker may know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.adapters.inject import remove
from fedlora.federation.spec import Tree
from fedlora.learning.backbone import Backbone

CHUNK = 96
"""Texts of one pass."""


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

    def gradients(
        self, tree: Tree, seen: Sequence[str], x: Tensor, labels: Tensor, again: bool = False
    ) -> list[Tensor]:
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
    return torch.stack(
        [1 - torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=1e-30) for a, b in pairs]
    ).mean(0)


@dataclass(frozen=True, eq=False)
class Case:
    """Who sees what. ``seen``: the factors whose gradients travel; ``tree``: the models that they are gradients of;
    ``guess``: those that the attacker has for them (both with a first dimension of attacked texts)."""

    name: str
    layers: tuple[int, ...]
    seen: tuple[str, ...]
    tree: Tree
    guess: Tree


def repeated(tree: Tree, index: Tensor) -> dict[str, Tensor]:
    return {name: value[index] for name, value in tree.items()}


def cut(ids: Tensor, length: int) -> Tensor:
    """The first tokens of texts, [CLS] and [SEP] around them."""
    return torch.cat([ids[:, : length - 1], ids[:, -1:]], 1)


def observed(target: Target, case: Case, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradients that are seen, by factor."""
    keys = [key for key in case.tree if key.rpartition("/")[2] in case.seen]
    texts = [
        target.gradients(repeated(case.tree, own), case.seen, target.words[ids[own]].detach(), labels[own])
        for own in torch.arange(len(ids)).split(CHUNK)
    ]
    return dict(zip(keys, (torch.cat(parts) for parts in zip(*texts, strict=True)), strict=True))


def distances(
    target: Target, case: Case, owner: Tensor, wanted: Sequence[Tensor], ids: Tensor, labels: Tensor
) -> Tensor:
    """The mismatch of each candidate text (candidates, tokens); ``owner``: which text it is a candidate for."""
    out: list[Tensor] = []
    for own, tokens in zip(owner.split(CHUNK), ids.split(CHUNK), strict=True):
        tree = repeated(case.guess, own)
        found = target.gradients(tree, case.seen, target.words[tokens].detach(), labels[own])
        out.append(mismatch(found, [w[own] for w in wanted]))
    return torch.cat(out)
