"""Executes orders: compatible ones of several clients run as lanes of one pass over the base."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.federation.client import Job
from fedlora.federation.orders import Fit, Model, Order, Score, Split, logits
from fedlora.federation.spec import ModelSpec
from fedlora.learning.backbone import Backbone
from fedlora.learning.batches import FAST, PASS, Group, Steady, borders, cut, parted, rectangle, rows_of, to_device
from fedlora.learning.examples import Examples, Task
from fedlora.learning.fitting import Fits
from fedlora.learning.flops import Meter
from fedlora.learning.footprint import EVERY, Pages, prepare
from fedlora.learning.generation import answer_scores, answers
from fedlora.learning.lanes import Held, Merges, Stack, alone, anonymous, check, finite, structure
from fedlora.learning.language import CausalLM
from fedlora.learning.optim import chosen
from fedlora.learning.packing import packed_sizes

prepare()
COMPILED = (torch.bfloat16,)
"""Types whose matrix products are compiled for every shape."""
Splits = Mapping[str, np.ndarray]
"""Rows of the table by "fit", "holdout" and "test"."""
SCORING = 4
"""A pass without gradients holds this many times the tokens of one with them (not where each token has logits)."""


@dataclass(frozen=True, eq=False)
class Ready:
    """A job that has been checked: its models by name, the units of its split, what it shares lanes with (``key``), and
    what its passes cost the same as (``kind``)."""

    ticket: int
    job: Job
    models: Mapping[str, Held]
    units: np.ndarray
    key: tuple[object, ...]
    kind: int = 0


@dataclass(eq=False)
class Learner:
    """Runs jobs on shared frozen backbones (an ``Executor``).

    ``examples``: the tokenised store, or one per backbone where these read text differently; ``splits``: rows by
    client and split; ``lanes``: how many jobs share a pass; ``tokens``: how many of them a pass with gradients holds;
    ``dropout``: of the adapters' input while training; ``own_labels``: loss and scores know only the labels that occur
    in the client's own data.

    With ``lanes = 1`` a result is a function of the job and the data alone.
    """

    backbones: Mapping[str, Backbone]
    task: Task
    examples: Examples | Mapping[str, Examples]
    splits: Mapping[str, Splits]
    spec: ModelSpec
    run_seed: int
    lanes: int = 1
    tokens: int = 2048
    dropout: float = 0.0
    own_labels: bool = False

    def __post_init__(self) -> None:
        self.head = {k: v for k, v in self._start.items() if k.startswith("head/")}
        self.merges = Merges()
        self.meter = Meter()
        self.steps = 0  # client-steps of training so far: what throughput counts
        self._tickets = 0
        self._turns = 0
        self._pages = Pages()
        self._masks: dict[str, Tensor] = {}
        self._checked: set[tuple[object, ...]] = set()
        self._waiting: dict[tuple[object, ...], deque[Ready]] = {}
        self._running: dict[tuple[object, ...], Fits] = {}

    # -- the executor

    def submit(self, job: Job) -> int:
        """Checks a job and takes it. What is wrong with the order itself (a name nothing reads, say) raises here."""
        ticket, self._tickets = self._tickets, self._tickets + 1
        ready = self._prepare(ticket, job)
        self._waiting.setdefault(ready.key, deque()).append(ready)
        return ticket

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def forget(self) -> None:
        """Drops every job: nobody waits for them any more."""
        self._waiting.clear()
        self._running.clear()

    def advance(self) -> list[tuple[int, Any | Exception]]:
        """One fused step of training, or the scoring of as many jobs as there are lanes.

        The kind of work that most jobs wait for goes first, then the oldest. A job that diverged has ``Diverged`` as
        its result.
        """
        if self.idle:
            return []
        self._turns += 1
        if self._turns % EVERY == 0:
            self._pages.look()

        def urgency(key: tuple[object, ...]) -> tuple[int, int]:
            waiting, running = self._waiting.get(key, ()), self._running.get(key)
            tickets = [r.ticket for r in waiting] + (running.tickets if running else [])
            return -len(tickets), min(tickets)

        key = min({**self._running, **self._waiting}, key=urgency)
        queue = self._waiting.get(key, deque())
        if key[0] is Fit:
            done = self._fit(key, queue)
        else:
            taken = [queue.popleft() for _ in range(min(self._width(key), len(queue)))]
            measure = self._score if key[0] is Score else self._features
            done = measure(taken)
        if not queue:
            self._waiting.pop(key, None)
        return done

    # -- what others ask

    def units(self, client: str, split: Split, limit: int | None = None, backbone: str = "base") -> np.ndarray:
        """The units of a client's split; train = fit + holdout."""
        rows = self.splits[client]
        names = ("fit", "holdout") if split == "train" else (split,)
        empty = np.zeros(0, dtype=np.int64)
        found = np.concatenate([np.asarray(rows.get(name, empty), dtype=np.int64) for name in names])
        return self.store(backbone).units(found)[:limit]

    def facts(self, client: str) -> tuple[int, Mapping[str, int]]:
        """(training units, counts by label)."""
        units = self.units(client, "train")
        counts = np.bincount(self.store("base").labels[units], minlength=len(self.spec.labels))
        return len(units), {label: int(n) for label, n in zip(self.spec.labels, counts)}

    def label_mask(self, client: str) -> Tensor | None:
        """(labels,) True where a label occurs in the client's own data; None: it has them all."""
        if not self.own_labels or not self.spec.labels:
            return None
        if client not in self._masks:
            store = self.store("base")
            rows = [store.units(np.asarray(rows, dtype=np.int64)) for rows in self.splits[client].values()]
            mask = torch.zeros(len(self.spec.labels), dtype=torch.bool)
            mask[torch.from_numpy(store.labels[np.concatenate(rows)])] = True
            self._masks[client] = mask
        return self._masks[client]

    def knows(self, client: str, labels: Collection[str]) -> None:
        """States the labels of a client whose rows do not tell: a model's own, say, that is scored on other data."""
        self._masks[client] = torch.tensor([label in labels for label in self.spec.labels])

    # -- preparation

    def store(self, backbone: str) -> Examples:
        return self.examples if isinstance(self.examples, Examples) else self.examples[backbone]

    @cached_property
    def _start(self) -> dict[str, Tensor]:
        """The whole parameters' start, drawn once."""
        return self.spec.start(self.run_seed)

    def _width(self, key: tuple[object, ...]) -> int:
        return 1 if key[-1] is not None else self.lanes

    def _prepare(self, ticket: int, job: Job) -> Ready:
        order: Order = job.order
        if isinstance(order, Fit):
            if order.split in ("test", "validation"):
                raise PermissionError(f"nobody trains on the {order.split} split")
            models = {"model": order.models} if isinstance(order.models, Model) else dict(order.models)
            trains = dict(order.train) if isinstance(order.train, Mapping) else {"model": order.train}
            if models.keys() != trains.keys():
                raise KeyError(f"models {sorted(models)}, but train names {sorted(trains)}")
            held = {name: self._complete(model, trains[name]) for name, model in models.items()}
            limit, code = None, order.objective
        else:
            held = {"model": self._complete(order.model, ())}
            limit, code = getattr(order, "limit", None), None
        first = next(iter(held.values())).model.backbone
        single = self.lanes == 1 or any(alone(h, self.backbones[h.model.backbone]) for h in held.values())
        ranks = {} if single else self.spec.ranks
        shape = tuple((name, structure(h, ranks)) for name, h in sorted(held.items()))
        key = (type(order), code, shape, ticket if single else None)
        kind = self.meter.kind((type(order), code, tuple((name, anonymous(s)) for name, s in shape)))
        return Ready(ticket, job, held, self.units(job.client, order.split, limit, first), key, kind)

    def _complete(self, model: Model, selectors: Sequence[str]) -> Held:
        """Checked, and completed with the base's own values (or the seeded start) of what a selector asks to train."""
        if model.backbone not in self.backbones:
            raise KeyError(f"no backbone {model.backbone!r}, only {sorted(self.backbones)}")
        backbone = self.backbones[model.backbone]
        own_names, shared_names = (tuple(map(tuple, trees)) for trees in ((model.params, *model.others), model.shared))
        names = (model.backbone, own_names, shared_names)
        if names not in self._checked:  # clients' models are alike
            check(model, backbone, self.spec.whole)
            self._checked.add(names)
        own: dict[str, Tensor] = {}
        if selectors:
            prefixes = {selector.split("/", 1)[0] for selector in selectors}
            own = {key: value.to(self.spec.dtype) for key, value in backbone.own(selectors).items()}
            if prefixes & {name.split("/", 1)[0] for name in self.spec.whole}:
                shared = prefixes if model.backbone == "base" else prefixes & {"head"}  # the others are the base's own
                own |= {k: v for k, v in self._start.items() if k.split("/", 1)[0] in shared and readable(k, backbone)}
        params = {**own, **model.params}
        return Held(model, params, chosen(tuple(selectors), tuple(params)))

    # -- training

    def _fit(self, key: tuple[object, ...], queue: deque[Ready]) -> list[tuple[int, Any]]:
        fits = self._running.get(key)
        if fits is None:
            fits = self._running[key] = Fits(self, queue[0], self._width(key))
        done = fits.fill(queue)
        done += fits.step()
        if not queue and not fits.tickets:
            del self._running[key]
        return done

    # -- measuring

    @torch.no_grad()
    def _score(self, taken: Sequence[Ready]) -> list[tuple[int, Any]]:
        """The task's sums of several jobs: {name: (total, count)} each."""
        stack = self._stack(taken)
        totals: list[dict[str, list[float]]] = [{} for _ in taken]
        store = self.store(taken[0].models["model"].model.backbone)
        predict = taken[0].models["model"].model.predict
        for group, outputs, labels in self._passes(taken, stack):
            parts = [outputs.logits]
            if predict is not logits:
                parts = [
                    predict(type(outputs)(rows_of(outputs.logits, s), rows_of(outputs.features, s)), stack.params(s[0]))
                    for s in group.segments
                ]
            scored = self.task.score(torch.cat(parts), labels, store, group.units)
            for name, pair in scored.items():
                for lane, start, stop in group.segments:
                    into = totals[lane].setdefault(name, [0.0, 0.0])
                    for i in (0, 1):
                        into[i] += float(pair[i][start:stop].sum())
        results = [{name: (pair[0], pair[1]) for name, pair in sums.items()} for sums in totals]
        if isinstance(self.task, CausalLM) and self.task.generate:
            work = {lane: ready.units for lane, ready in enumerate(taken) if len(ready.units)}
            given = answers(stack, store, work, self.task.generate, self.tokens)
            for lane, units in work.items():
                results[lane] |= answer_scores(given[lane], store, units, stack.backbone.processor)
        return [(ready.ticket, sums) for ready, sums in zip(taken, results)]

    @torch.no_grad()
    def _features(self, taken: Sequence[Ready]) -> list[tuple[int, Any]]:
        """(features, labels) of several jobs, in the order of their units."""
        stack = self._stack(taken)
        store = self.store(taken[0].models["model"].model.backbone)
        width = self.backbones[taken[0].models["model"].model.backbone].width
        found = [torch.zeros(len(r.units), width, dtype=self.spec.dtype) for r in taken]
        for group, outputs, _ in self._passes(taken, stack):
            for segment in group.segments:
                places = torch.from_numpy(group.places[segment[1] : segment[2]])
                found[segment[0]][places] = rows_of(outputs.features, segment).to("cpu", self.spec.dtype)
        labels = [torch.from_numpy(store.labels[r.units]) for r in taken]
        return [(r.ticket, (x, y)) for r, x, y in zip(taken, found, labels)]

    def _stack(self, taken: Sequence[Ready]) -> Stack:
        first = taken[0].models["model"]
        backbone = self.backbones[first.model.backbone]
        stack = Stack(backbone, self.spec, self.head, self.merges, first, self._width(taken[0].key), {})
        for lane, ready in enumerate(taken):
            stack.load(lane, ready.models["model"])
        return stack

    def _passes(self, taken: Sequence[Ready], stack: Stack) -> Any:
        work = {lane: ready.units for lane, ready in enumerate(taken) if len(ready.units)}
        masks = [self.label_mask(r.job.client) for r in taken]
        together = stack.joins
        if work:
            name = taken[0].models["model"].model.backbone
            tokens = self.tokens * (1 if stack.backbone.kind == "causal-lm" else SCORING)
            for group in self.groups(stack.backbone, name, work, tokens):
                inputs, labels = self.batch(stack.backbone, name, group)
                stack.merge()
                with self.watched(taken[0].kind, [name], group, [ready.job.client for ready in taken], together):
                    outputs = stack.outputs(inputs, group.segments, masks, together=together)
                if together and not finite((outputs.logits, outputs.features)):  # whose it is only lanes apart say
                    with self.watched(taken[0].kind, [name], group, [ready.job.client for ready in taken], False):
                        outputs = stack.outputs(inputs, group.segments, masks)
                yield group, outputs, labels

    def watched(
        self, kind: int, names: Sequence[str], group: Group, clients: Sequence[str], together: bool
    ) -> AbstractContextManager[None]:
        """Counts the operations of a pass over a group. ``names``: the backbones; ``clients``: by lane."""
        together = together and len(group.segments) > 1
        sizes: list[float] = []
        for name in dict.fromkeys(names):
            lengths = self.store(name).lengths[group.units]
            sizes += self._sizes(self.backbones[name], name, lengths, together)
        tokens = self.store(next(iter(names))).lengths[group.units]
        shares = [(clients[lane], int(tokens[start:stop].sum())) for lane, start, stop in group.segments]
        return self.meter.watch(kind, sizes, shares)

    def _sizes(self, backbone: Backbone, name: str, lengths: np.ndarray, together: bool) -> list[float]:
        """What a pass over sequences of some lengths costs a linear function of: rows, and rows and tokens with padding
        (heads); tokens and scores of layers without padding; tokens of layers with it, scores by plain products and by
        SDPA; tokens that meet the factors of all lanes."""
        real = rows = len(lengths)
        longest = int(lengths.max())
        if (steady := self.steady(backbone, name, longest)) is not None:
            rows, longest = map(int, steady.shape(rows, longest))
        padded = rows * longest
        if not backbone.packs(longest):
            scores = (padded * longest, 0) if backbone.short(longest) else (0, padded * longest)
            return [real, rows, padded, 0, 0, padded, *scores, padded if together else 0]
        grown = np.concatenate([lengths, np.ones(rows - real, dtype=lengths.dtype)])
        tokens, scores = packed_sizes(grown, backbone.dtype, together, backbone.by_ends)
        return [real, rows, padded, tokens, scores, 0, 0, 0, tokens if together else 0]

    def steady(self, backbone: Backbone, name: str, longest: int) -> Steady | None:
        """Of which shapes a backbone's batches of this length are; None: of any."""
        store = self.store(name)
        compiled = backbone.dtype in COMPILED and backbone.device.type == "cpu" and store.tokens is not None
        packs = backbone.packs(longest)
        if not compiled or (packs and backbone.kind != "causal-lm"):  # its head sees padding
            return None
        most = int(store.lengths.max())
        return Steady(min(most, backbone.limit) if packs else most)

    def groups(self, backbone: Backbone, name: str, work: Mapping[int, np.ndarray], tokens: int) -> list[Group]:
        """The passes of some work on a backbone; ``tokens``: what one may hold."""
        lengths = self.store(name).lengths
        steady = self.steady(backbone, name, int(lengths.max()))
        limit = 0 if backbone.kind == "causal-lm" else backbone.limit
        longer = partial(borders, computed=steady or rectangle, another=PASS if steady is None else FAST)
        choose = partial(parted, limit=limit, longer=longer)
        return cut(work, lengths, tokens, choose)

    def batch(self, backbone: Backbone, name: str, group: Group) -> tuple[dict[str, Tensor], Tensor]:
        """A group's inputs and labels, where the backbone is."""
        inputs, labels = self.task.collate(self.store(name), group.units)
        longest = int(self.store(name).lengths[group.units].max())
        if (steady := self.steady(backbone, name, longest)) is not None:
            inputs, labels = steady.grown(dict(inputs), labels, self.store(name).pad)
        return to_device(inputs, backbone.device, backbone.dtype), labels.to(backbone.device)


def readable(key: str, backbone: Backbone) -> bool:
    """Whether a whole parameter exists on this backbone (every backbone has the head)."""
    return key.startswith("head/") or backbone.reads(key) is not None
