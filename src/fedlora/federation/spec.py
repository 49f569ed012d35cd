"""What participants know before the first round: the model's specification, the client, and the names of arrays."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Tree = Mapping[str, Tensor]
"""Flat. ``site/A``, ``site/B``, ``site/C``, ``site/scale`` (0-dim), ``site/W`` (a dense change of a base weight), whole
parameters (``head/weight``, ``norm/<name>``, ``embedding/<name>``), a private model's ``backbone/...``, and
``extra/...``: arrays that only objectives, predictions and gates read. Any other name is an error."""
Shape = tuple[int, ...]
Sums = Mapping[str, tuple[float, float]]
"""(total, count) by name: they merge exactly."""


def derive(*parts: object) -> int:
    """A seed for a named stream, the same on every side: 63 bits of SHA-256, never ``hash()``.

    >>> derive(0, "cohort", 1) == derive(0, "cohort", 1) != derive(0, "cohort", 2)
    True
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(*parts: object) -> torch.Generator:
    """A torch generator (CPU) for a named stream."""
    return torch.Generator().manual_seed(derive(*parts))


@dataclass(frozen=True)
class ModelSpec:
    """What all participants agree on before round 1.

    ``sites``: (out, in) of every adapted layer. ``ranks``: the largest rank served, per site. ``whole``: shapes of
    heads, norms and embeddings that may train; ``pretrained`` holds the values of those that the base brings along (the
    others start from a seeded draw), and the factors of an adapter that a run starts from. ``labels`` is the label
    space (empty for language modelling), ``width`` that of the pooled representation. ``alpha`` is alpha at the largest
    rank served.
    """

    sites: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]
    whole: Mapping[str, Shape]
    labels: tuple[str, ...]
    width: int
    alpha: float = 8.0
    scaling: Literal["shared", "per-rank"] = "shared"
    dtype: torch.dtype = torch.float32
    pretrained: Tree = field(default_factory=dict[str, Tensor], compare=False)

    def scale(self, site: str, rank: int) -> Tensor:
        """s = alpha / r_max for everyone ("shared") or alpha / r ("per-rank"); 0-dim."""
        reference = self.ranks[site] if self.scaling == "shared" else rank
        return torch.tensor(self.alpha / reference, dtype=self.dtype)

    def adapter(self, ranks: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        """PEFT's start: A Kaiming-uniform (bound 1/sqrt(in)), B = 0; A (r, in), B (out, r).

        Same seed, same values on every side; smaller ranks are prefixes of larger ones. Ranks are clamped to
        min(out, in). A site whose factors are among ``pretrained`` starts from those, s B A unchanged; rows beyond
        theirs are drawn as usual.
        """
        tree: dict[str, Tensor] = {}
        for site, (out, inner) in self.sites.items():
            rank = min(ranks[site], out, inner)
            full = torch.rand(self.ranks[site], inner, generator=stream(seed, site, "A"), dtype=self.dtype)
            tree[f"{site}/A"] = ((2 * full - 1) / math.sqrt(inner))[:rank].clone()
            tree[f"{site}/B"] = torch.zeros(out, rank, dtype=self.dtype)
            tree[f"{site}/scale"] = self.scale(site, rank)
            if f"{site}/A" in self.pretrained:
                a, b, scale = (self.pretrained[f"{site}/{name}"].to(self.dtype) for name in ("A", "B", "scale"))
                if len(a) > rank:
                    raise ValueError(f"{site} starts from an adapter of rank {len(a)}, but a client has rank {rank}")
                tree[f"{site}/A"][: len(a)] = a
                tree[f"{site}/B"][:, : len(a)] = b * (scale / tree[f"{site}/scale"])
        return tree

    def start(self, seed: int) -> dict[str, Tensor]:
        """The whole parameters' start: the base's own values where it has them, else N(0, 1/in) and zero biases."""
        tree: dict[str, Tensor] = {}
        for name, shape in self.whole.items():
            if name in self.pretrained:
                tree[name] = self.pretrained[name].to(self.dtype, copy=True)
            elif len(shape) > 1:
                draw = torch.randn(shape, generator=stream(seed, name), dtype=self.dtype)
                tree[name] = draw / math.sqrt(shape[-1])
            else:
                tree[name] = torch.zeros(shape, dtype=self.dtype)
        return tree


@dataclass(frozen=True)
class Client:
    """What the server knows of a client: its id, its rank per site, its backbone and its registered example count."""

    id: str
    ranks: Mapping[str, int]
    backbone: str = "base"
    examples: int | None = None


@dataclass(frozen=True)
class Local:
    """What a client program knows: itself, the agreed specification, the round, and counts of its own data."""

    client: Client
    spec: ModelSpec
    round: int
    rounds: int
    run_seed: int
    examples: int
    label_counts: Mapping[str, int]

    def seed(self, *names: object) -> int:
        """A seed for the client program's own draws, private to (run, round, client, names)."""
        return derive(self.run_seed, self.round, self.client.id, *names)


@dataclass(frozen=True)
class Extras:
    """How whole parameters take part: "share" (trained and averaged), "private" (trained, stays home) or "frozen".
    ``backbone`` is the whole base but its head, norms and embeddings with it.

    >>> extras = Extras(head="private", norm="share")
    >>> extras.trained
    ('head', 'norm')
    >>> sorted(extras.travelling({"head/weight": 1, "norm/a": 2, "embedding/e": 3, "site/A": 4}))
    ['norm/a', 'site/A']
    """

    head: Literal["share", "private", "frozen"] = "share"
    norm: Literal["share", "private", "frozen"] = "frozen"
    embedding: Literal["share", "private", "frozen"] = "frozen"
    backbone: Literal["share", "private", "frozen"] = "frozen"

    def treatment(self, name: str) -> str:
        """How a parameter of a tree is treated; what is no head, norm, embedding or backbone travels."""
        kind = name.split("/", 1)[0]
        return getattr(self, kind) if kind in ("head", "norm", "embedding", "backbone") else "share"

    @property
    def trained(self) -> tuple[str, ...]:
        """Selectors of the whole parameters that train."""
        kinds = ("head", "norm", "embedding", "backbone")
        return tuple(kind for kind in kinds if self.treatment(kind + "/") != "frozen")

    @property
    def personal(self) -> bool:
        """Some parameter stays home: there is no single global model to score."""
        return "private" in (self.head, self.norm, self.embedding, self.backbone)

    def travelling(self, tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries that are sent."""
        return {name: value for name, value in tree.items() if self.treatment(name) == "share"}

    def staying(self, tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries that are trained and kept at home."""
        return {name: value for name, value in tree.items() if self.treatment(name) == "private"}
