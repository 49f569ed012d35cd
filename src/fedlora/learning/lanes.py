"""Models of several clients on one base: their arrays stacked over lanes, and one forward pass over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedlora.adapters.algebra import product, sites
from fedlora.adapters.lora import Dense, Dropout, Factors, Plan, Segment, mergeable, merged_weight
from fedlora.federation.orders import FORBIDDEN, Gate, Model, Outputs
from fedlora.federation.spec import ModelSpec, Shape, Tree
from fedlora.learning.backbone import Backbone
from fedlora.learning.batches import rows_of

TOGETHER = (torch.bfloat16,)
"""Types in which all lanes' factors meet all rows in one product."""


@dataclass(frozen=True, eq=False)
class Held:
    """One model of one job, ready for a lane: ``params`` hold the backbone's own values of what is trained."""

    model: Model
    params: Mapping[str, Tensor]
    trained: tuple[str, ...] = ()

    @property
    def trees(self) -> tuple[Tree, ...]:
        return (self.params, *self.model.others)


@lru_cache(maxsize=1 << 16)  # every job of every client asks for the same names
def factor(key: str) -> tuple[str, str] | None:
    """(site, A | B | C | W | scale) of an entry at a site, else None."""
    site, _, last = key.rpartition("/")
    return (site, last) if last in ("A", "B", "C", "W", "scale") and not key.startswith("extra/") else None


def padded(key: str, shape: Shape, ranks: Mapping[str, int]) -> Shape:
    """The shape of an entry when its factors have at least the rank of ``ranks``.

    >>> padded("x/A", (2, 5), {"x": 4}), padded("x/B", (3, 2), {"x": 4}), padded("x/C", (6, 6), {"x": 4})
    ((4, 5), (3, 4), (6, 6))
    """
    found = factor(key)
    if found is None or found[1] not in ("A", "B", "C"):
        return tuple(shape)
    largest = ranks.get(found[0], 0)
    along = {"A": (0,), "B": (1,), "C": (0, 1)}[found[1]]
    return tuple(max(size, largest) if i in along else size for i, size in enumerate(shape))


def own_part(value: Tensor, shape: Shape) -> Tensor:
    """The leading corner of a padded array that belongs to its owner."""
    return value if value.shape == shape else value[tuple(slice(0, size) for size in shape)]


def structure(held: Held, ranks: Mapping[str, int]) -> tuple[object, ...]:
    """What must agree for models to share a stack: everything but values, ranks, constant weights and scales."""
    model = held.model
    known = tuple(ranks.items())
    trees = tuple(_shapes(tuple((key, value.shape) for key, value in tree.items()), known) for tree in held.trees)
    gate = model.weights if callable(model.weights) else None
    shared = tuple(id(value) for tree in model.shared for value in tree.values())
    return (model.backbone, model.predict, gate, trees, shared, held.trained)


@lru_cache(maxsize=256)  # clients' trees are alike
def _shapes(entries: tuple[tuple[str, Shape], ...], ranks: tuple[tuple[str, int], ...]) -> tuple[object, ...]:
    """Names and shapes, sorted, when factors have at least these ranks."""
    known = dict(ranks)
    return tuple(sorted((key, padded(key, shape, known)) for key, shape in entries))


def anonymous(structure: tuple[object, ...]) -> tuple[object, ...]:
    """A structure without the identity of shared changes: models that differ in it alone cost the same."""
    backbone, predict, gate, trees, shared, trained = structure
    return (backbone, predict, gate, trees, bool(shared), trained)


def alone(held: Held, backbone: Backbone) -> bool:
    """Whether a model replaces the base's own parameters or changes them densely: then it has a pass of its own."""
    return any(
        backbone.reads(key) is not None or ((found := factor(key)) is not None and found[1] == "W")
        for tree in held.trees
        for key in tree
    )


@dataclass(eq=False)
class Merges:
    """Base changes, summed and merged once for all models that hold the same objects; only the latest is kept."""

    kept: dict[int, tuple[object, tuple[Tree, ...], dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=dict)
    count: int = 0

    def get(self, backbone: Backbone, shared: tuple[Tree, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(replaced weights, dense changes of bases whose weight is not known), by site."""
        if not shared:
            return {}, {}
        key = tuple(id(value) for tree in shared for value in tree.values())
        kept = self.kept.get(id(backbone))
        if kept is None or kept[0] != key:
            self.count += 1
            total: dict[str, Tensor] = {}
            for tree in shared:
                for site in sites(tree):
                    change = product(tree, site)
                    total[site] = total[site] + change if site in total else change
            merged, dense = {}, {}
            for site, change in total.items():
                base = backbone.sites[site].base
                if mergeable(base):
                    merged[site] = merged_weight(base, change)
                else:
                    dense[site] = change.to(backbone.device)
            kept = self.kept[id(backbone)] = (key, shared, merged, dense)  # holds the objects, so that ids stay theirs
        return kept[2], kept[3]


class Stack:
    """The models of one name in all lanes: factors zero-padded to common ranks and stacked, (lanes, ...).

    ``leaves`` are the trained arrays (views of a fit's flat rows, whose gradients they collect).
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: ModelSpec,
        head: Tree,
        merges: Merges,
        first: Held,
        lanes: int,
        leaves: Mapping[str, Tensor],
    ) -> None:
        self.backbone, self.head, self.merges = backbone, head, merges
        self.lanes, self.leaves = lanes, leaves
        self.ranks = spec.ranks if lanes > 1 else {}
        self.dtype = working(spec.dtype)
        self.held: list[Held | None] = [None] * lanes
        self.arrays: list[dict[str, Tensor]] = [
            {key: self._zeros(key, value) for key, value in self._read(tree, i).items() if key not in leaves or i}
            for i, tree in enumerate(first.trees)
        ]
        self.scales: list[dict[str, list[float]]] = [
            {found[0]: [0.0] * lanes for key in tree if (found := factor(key)) and found[1] == "A"}
            for tree in first.trees
        ]
        self._slots: dict[str, list[tuple[int, Factors]]] | None = None

    def merge(self) -> None:
        """Merges the shared changes, where that is not done yet."""
        held = next(h for h in self.held if h is not None)
        self.merges.get(self.backbone, held.model.shared)

    def load(self, lane: int, held: Held) -> None:
        """Puts a model into a lane, in the place of whatever was there."""
        self.held[lane] = held
        self._slots = None
        weights = held.model.weights
        constants = weights if weights is not None and not callable(weights) else (1.0,) * len(held.trees)
        if len(constants) != len(held.trees):
            raise ValueError(f"{len(constants)} weights for {len(held.trees)} adapters (params and others)")
        with torch.no_grad():
            for i, tree in enumerate(held.trees):
                for key, value in self._read(tree, i).items():
                    if i == 0 and key in self.leaves:
                        place(self.leaves[key][lane], value)
                    elif self.lanes == 1:
                        self.arrays[i][key] = value.to(self.backbone.device, self.dtype)[None]
                    else:
                        place(self.arrays[i][key][lane], value)
                for site, scales in self.scales[i].items():
                    scales[lane] = float(tree[f"{site}/scale"]) * constants[i]

    def params(self, lane: int) -> dict[str, Tensor]:
        """A lane's parameters in their own shapes; the trained ones are connected to the graph."""
        held = self.held[lane]
        assert held is not None
        out = {key: value.to(self.backbone.device) for key, value in held.params.items() if key not in self.leaves}
        for key, leaf in self.leaves.items():
            out[key] = own_part(leaf[lane], tuple(held.params[key].shape))
        return out

    def outputs(
        self,
        inputs: Mapping[str, Tensor],
        segments: tuple[Segment, ...],
        masks: Sequence[Tensor | None],
        dropout: Dropout | None = None,
        together: bool = False,
    ) -> Outputs:
        """What each row's own model says of it. ``masks``: (labels,) per lane, True where a label is the client's;
        ``together``: see ``Plan.together``.

        Rows of padding beyond the last segment count as its own on the way, and nothing is said of them.
        """
        lane, start, real = segments[-1]
        rows = len(next(iter(inputs.values())))
        if dropout is not None:
            dropout = replace(dropout, keys=functional.pad(dropout.keys, (0, rows - real)))
        plan, overrides = self.plan(inputs, (*segments[:-1], (lane, start, rows)), dropout)
        features, logits = self.backbone.forward(inputs, plan, overrides, together)
        features = features[:real].to(self.dtype)
        logits = self._classify(features, segments) if logits is None else logits[:real].to(self.dtype)
        if any(masks[lane] is not None for lane, _, _ in segments):
            parts = [(rows_of(logits, s), masks[s[0]]) for s in segments]
            logits = torch.cat([v if m is None else v.masked_fill(~m.to(v.device), FORBIDDEN) for v, m in parts])
        return Outputs(logits, features)

    def plan(
        self, inputs: Mapping[str, Tensor], segments: tuple[Segment, ...], dropout: Dropout | None
    ) -> tuple[Plan, dict[str, Tensor]]:
        """How the adapted layers treat this batch, and the base parameters that are replaced."""
        held = next(h for h in self.held if h is not None)
        merged, changes = self.merges.get(self.backbone, held.model.shared)
        gates: Sequence[Tensor] | None = None
        if callable(held.model.weights):
            gates = self._gates(held.model.weights, inputs, segments, merged, changes)
        overrides = self._overrides() if self.lanes == 1 else {}
        if both := sorted(path for path in overrides if path.rpartition(".")[0] in merged):
            raise ValueError(f"a model replaces {both[0]!r} and carries a shared change of it: only one of the two")
        plan = Plan(segments, self._factors(gates), self._dense(changes, gates), merged, dropout)
        return plan, overrides

    @property
    def joins(self) -> bool:
        """Whether the lanes' factors may, and should, meet all rows in one product: they are finite, and the type is
        one in which that is faster."""
        fast = self.backbone.dtype in TOGETHER or self.backbone.device.type != "cpu"  # there calls are what is dear
        if self.lanes == 1 or not fast:
            return False
        return finite([v for slots in self._factors(None).values() for s in slots for v in (s.A, s.B, s.C)])

    # -- what the plan is made of

    def _read(self, tree: Tree, i: int) -> dict[str, Tensor]:
        """The entries that a forward pass reads: factors, and of the first tree the head and replaced parameters."""
        out = {key: value for key, value in tree.items() if (found := factor(key)) and found[1] != "scale"}
        if i == 0:
            out |= {key: tree.get(key, start) for key, start in self.head.items()}
            out |= {key: value for key, value in tree.items() if self.backbone.reads(key) or key in self.leaves}
        return out

    def _zeros(self, key: str, value: Tensor) -> Tensor:
        if self.lanes == 1:
            return value[None]  # replaced when loaded
        shape = padded(key, tuple(value.shape), self.ranks)
        return torch.zeros(self.lanes, *shape, dtype=self.dtype, device=self.backbone.device)

    def _array(self, i: int, key: str) -> Tensor | None:
        return self.leaves[key] if i == 0 and key in self.leaves else self.arrays[i].get(key)

    def _factors(self, gates: Sequence[Tensor] | None) -> dict[str, tuple[Factors, ...]]:
        if self._slots is None:
            self._slots = {}
            for i, scales in enumerate(self.scales):
                for site, scale in scales.items():
                    a, b = self._array(i, f"{site}/A"), self._array(i, f"{site}/B")
                    assert a is not None
                    assert b is not None
                    slot = Factors(a, b, self._array(i, f"{site}/C"), tuple(scale))
                    self._slots.setdefault(site, []).append((i, slot))
        return {
            site: tuple(slot if gates is None else replace(slot, gate=gates[i]) for i, slot in found)
            for site, found in self._slots.items()
        }

    def _dense(self, changes: Mapping[str, Tensor], gates: Sequence[Tensor] | None) -> dict[str, tuple[Dense, ...]]:
        found: dict[str, list[Dense]] = {site: [Dense(change)] for site, change in changes.items()}
        held = self.held[0]
        if self.lanes == 1 and held is not None:
            weights = held.model.weights
            for i, tree in enumerate(held.trees):
                constant = weights[i] if weights is not None and not callable(weights) else 1.0
                for key in tree:
                    if (site := factor(key)) and site[1] == "W":
                        value = self._array(i, key)
                        assert value is not None
                        gate = None if gates is None else gates[i]
                        found.setdefault(site[0], []).append(Dense(value[0], constant, gate))
        return {site: tuple(changes) for site, changes in found.items()}

    def _overrides(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for key in {**self.arrays[0], **self.leaves}:
            path = self.backbone.reads(key)
            if path is not None:
                value = self._array(0, key)
                assert value is not None
                out[path] = value[0].to(self.backbone.parameter(path).dtype)
        return out

    def _gates(
        self,
        gate: Gate,
        inputs: Mapping[str, Tensor],
        segments: tuple[Segment, ...],
        merged: Mapping[str, Tensor],
        changes: Mapping[str, Tensor],
    ) -> Sequence[Tensor]:
        """Weights per row, one array (rows,) per adapter, from the features of the base without adapters."""
        with torch.no_grad():
            dense = {site: (Dense(change),) for site, change in changes.items()}
            plain, _ = self.backbone.forward(inputs, Plan(segments, dense=dense, merged=merged))
        plain = plain.to(self.dtype)
        return torch.cat([gate(rows_of(plain, s), self.params(s[0])) for s in segments]).unbind(1)

    def _classify(self, features: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """logits = features W_k^T + b_k for each lane's rows, in the adapters' type."""
        weight, bias = self._array(0, "head/weight"), self._array(0, "head/bias")
        assert weight is not None
        weights = weight.unbind(0)
        biases: Sequence[Any] = (None,) * self.lanes if bias is None else bias.unbind(0)
        return torch.cat([functional.linear(rows_of(features, s), weights[s[0]], biases[s[0]]) for s in segments])


def finite(values: Iterable[Tensor | None]) -> bool:
    """Whether all numbers are (a sum of squares that overflows counts as not).

    >>> finite([torch.ones(2), None]), finite([torch.ones(2), torch.tensor([1.0, torch.nan])])
    (True, False)
    """
    norms = [torch.linalg.vector_norm(value.detach()) for value in values if value is not None]
    return bool(torch.stack(norms).isfinite().all()) if norms else True


def place(target: Tensor, value: Tensor) -> None:
    """Writes a value into the leading corner of a padded array; the rest is zero."""
    if target.shape != value.shape:
        target.zero_()
    own_part(target, tuple(value.shape)).copy_(value)


def working(dtype: torch.dtype) -> torch.dtype:
    """Adapters, heads and optimiser state: float64 where the run asks for it, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(model: Model, backbone: Backbone, whole: Iterable[str]) -> None:
    """A name that nothing reads would silently change nothing: an error."""
    whole = set(whole)
    for tree, first in ((model.params, True), *((t, False) for t in (*model.others, *model.shared))):
        for key in tree:
            found = factor(key)
            if found is not None and found[0] in backbone.sites:
                needed = {"W": ()}.get(found[1], ("A", "B", "scale"))
                if missing := [last for last in needed if f"{found[0]}/{last}" not in tree]:
                    raise KeyError(f"{key!r} without {found[0]}/{missing[0]}")
                continue
            extra = key.startswith("extra/")
            head = key.startswith("head/") and key in whole
            if not first or not (extra or head or backbone.reads(key) is not None):
                raise KeyError(f"nothing in backbone {model.backbone!r} reads {key!r}")
