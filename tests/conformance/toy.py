"""A tiny world for tests: seven clients, four classes with label skew, non-square sites, three backbones, and a learner
that executes orders by the real rules, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedlora.adapters.algebra import product, sites
from fedlora.engines.simulator import Simulator
from fedlora.federation.algorithm import Algorithm, Reply, Request, Update
from fedlora.federation.client import Job
from fedlora.federation.memory import RamMemory, Store
from fedlora.federation.orders import Batch, Features, Fit, Model, Optimizer, Order, Outputs, Score, Training, Tuned
from fedlora.federation.spec import Client, ModelSpec, Tree, stream
from fedlora.federation.wire import decode, encode

INPUTS, HIDDEN, WIDTH, LABELS = 10, 14, 8, ("red", "green", "blue", "grey")
SITES = {"fc1": (HIDDEN, INPUTS), "fc2": (WIDTH, HIDDEN)}
TRAINING = Training(epochs=2, optimizer=Optimizer(lr=0.01))
Data = Mapping[str, tuple[Tensor, Tensor]]  # "fit", "holdout", "test"
Lost = Callable[[str, int, str], str | None]
"""(kind, round, client) -> "before" or "after" its work, or None."""


@dataclass(frozen=True)
class Backbone:
    """A two-layer tanh network; ``own`` are its frozen or initial values."""

    own: Tree
    adaptable: bool = True

    @classmethod
    def make(cls, name: str, hidden: int, seed: int, adaptable: bool) -> Backbone:
        def normal(key: str, rows: int, columns: int) -> Tensor:
            draw = torch.randn(rows, columns, generator=stream(seed, name, key), dtype=torch.float64)
            return draw / math.sqrt(columns)

        own = {
            "backbone/fc1.weight": normal("fc1", hidden, INPUTS),
            "backbone/fc1.bias": torch.zeros(hidden, dtype=torch.float64),
            "backbone/fc2.weight": normal("fc2", WIDTH, hidden),
            "backbone/fc2.bias": torch.zeros(WIDTH, dtype=torch.float64),
        }
        return cls(own, adaptable)


@dataclass
class Learner:
    """An executor. ``advance`` runs everything that was submitted; ``groups`` remembers what came together."""

    spec: ModelSpec
    backbones: Mapping[str, Backbone]
    data: Mapping[str, Data]  # by client id
    run_seed: int
    log: list[Job] = field(default_factory=list)
    groups: list[list[Job]] = field(default_factory=list)
    merges: int = 0
    merged: tuple[tuple[Tree, ...], dict[str, Tensor]] = ((), {})  # one copy of a shared change
    waiting: dict[int, Job] = field(default_factory=dict)
    tickets: int = 0
    whole: Tree = field(init=False)

    def __post_init__(self) -> None:
        to, self.whole = self.spec.dtype, self.spec.start(self.run_seed)
        self.backbones = {n: replace(b, own={k: v.to(to) for k, v in b.own.items()}) for n, b in self.backbones.items()}
        self.data = {c: {s: (x.to(to), y) for s, (x, y) in d.items()} for c, d in self.data.items()}

    # ---- the executor's protocol

    @property
    def idle(self) -> bool:
        return not self.waiting

    def submit(self, job: Job) -> int:
        self.tickets += 1
        self.waiting[self.tickets] = job
        return self.tickets

    def advance(self) -> list[tuple[int, Any]]:
        jobs, self.waiting = self.waiting, {}
        self.groups.append(list(jobs.values()))
        return [(ticket, self.execute(job)) for ticket, job in jobs.items()]

    def execute(self, job: Job) -> Any:
        self.log.append(job)
        if isinstance(job.order, Fit):
            return self.fit(job.order, job)
        return self.score(job.order, job) if isinstance(job.order, Score) else self.pooled(job.order, job)

    # ---- data and models

    def examples(self, client: str, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        names = ("fit", "holdout") if split == "train" else (split,)
        x, y = (torch.cat([self.data[client][n][i] for n in names]) for i in range(2))
        return x[:limit], y[:limit]

    def check(self, model: Model) -> None:
        """A name that nothing reads would silently change nothing: an error."""
        backbone = self.backbones[model.backbone]
        for tree, others in ((model.params, False), *((t, True) for t in (*model.others, *model.shared))):
            for key in tree:
                site, _, last = key.rpartition("/")
                adapted = backbone.adaptable and site in self.spec.sites and last in ("A", "B", "C", "W", "scale")
                known = key in self.spec.whole or key in backbone.own or key.startswith("extra/")
                if not adapted and (others or not known):
                    raise KeyError(f"nothing in backbone {model.backbone!r} reads {key!r}")

    def base_change(self, shared: tuple[Tree, ...]) -> dict[str, Tensor]:
        """The sum of shared changes, merged once for all models that hold the same objects."""
        known, total = self.merged
        if identity(known) != identity(shared):
            self.merges += 1
            total = {}
            for tree in shared:
                for site in sites(tree):
                    total[site] = total.get(site, 0) + product(tree, site)
            self.merged = (shared, total)
        return total

    def own(self, backbone: str) -> dict[str, Tensor]:
        """The backbone's values and the shared head's start."""
        return {**self.backbones[backbone].own, **self.whole}

    def start(self, model: Model, chosen: Sequence[str]) -> dict[str, Tensor]:
        """params, completed with the backbone's own values (and the shared head) where a selector trains them."""
        return {**{k: v for k, v in self.own(model.backbone).items() if k.split("/")[0] in chosen}, **model.params}

    def forward(self, model: Model, params: Tree, x: Tensor) -> Outputs:
        own = self.own(model.backbone)
        change = self.base_change(model.shared) if model.shared else {}
        trees = (params, *model.others)
        if callable(model.weights):
            plain = self.features(own, change, x, (), ())
            weights: Sequence[Any] = model.weights(plain, params).unsqueeze(-1).unbind(1)
        else:
            weights = model.weights or (1.0,) * len(trees)
        values = {**own, **params}
        h = self.features(values, change, x, trees, weights)
        return Outputs(functional.linear(h, values["head/weight"], values["head/bias"]), h)

    def features(self, own: Tree, change: Tree, x: Tensor, trees: Sequence[Tree], weights: Sequence[Any]) -> Tensor:
        for layer in ("fc1", "fc2"):
            weight = own[f"backbone/{layer}.weight"]
            weight = weight if layer not in change else weight + change[layer]
            y = functional.linear(x, weight, own[f"backbone/{layer}.bias"])
            for tree, w in zip(trees, weights, strict=True):
                if f"{layer}/W" in tree:
                    y = y + w * functional.linear(x, tree[f"{layer}/W"])
                if f"{layer}/A" in tree:
                    z = x @ tree[f"{layer}/A"].T
                    z = z @ tree[f"{layer}/C"].T if f"{layer}/C" in tree else z
                    y = y + w * tree[f"{layer}/scale"] * (z @ tree[f"{layer}/B"].T)
            x = torch.tanh(y)
        return x * own["norm/gain"]

    # ---- orders

    def fit(self, order: Fit, job: Job) -> Tuned:
        if order.split == "test":
            raise PermissionError("nobody trains on the test split")
        models = {"model": order.models} if isinstance(order.models, Model) else dict(order.models)
        trains = dict(order.train) if isinstance(order.train, Mapping) else {"model": order.train}
        params: dict[str, dict[str, Tensor]] = {}
        chosen: dict[str, dict[str, Tensor]] = {}
        for name, model in models.items():
            self.check(model)
            params[name] = self.start(model, trains[name])
            for selector in trains[name]:
                if not any(selects(selector, key) for key in params[name]):
                    raise KeyError(f"{selector!r} selects nothing of {sorted(params[name])}")
            picked = [key for key in params[name] if any(selects(s, key) for s in trains[name])]
            chosen[name] = {key: params[name][key].clone().requires_grad_() for key in picked}
            params[name] |= chosen[name]
        leaves = [value for tree in chosen.values() for value in tree.values()]
        optimizer = build(order.optimizer, chosen)
        x, y = self.examples(job.client, order.split)
        batches = plan(len(y), order, torch.Generator().manual_seed(job.seed))
        total = 0.0
        for index in batches:
            batch = Batch(x[index], y[index])
            outputs = {name: self.forward(model, params[name], batch.inputs) for name, model in models.items()}
            losses = order.objective(outputs, params, batch)
            loss = losses.mean()
            if order.proximal is not None:
                for key, anchor in order.proximal.anchor.items():
                    if key in chosen["model"]:
                        loss = loss + order.proximal.strength / 2 * (chosen["model"][key] - anchor).square().sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            if order.optimizer.clip is not None:
                torch.nn.utils.clip_grad_norm_(leaves, order.optimizer.clip)
            optimizer.step()
            total += float(losses.detach().sum())
        done = {name: {k: v.detach().clone() for k, v in tree.items()} for name, tree in params.items()}
        return Tuned(done, {"train_loss": (total, float(sum(len(b) for b in batches)))}, len(batches))

    @torch.no_grad()
    def score(self, order: Score, job: Job) -> dict[str, tuple[float, float]]:
        self.check(order.model)
        x, y = self.examples(job.client, order.split, order.limit)
        out = order.model.predict(self.forward(order.model, order.model.params, x), order.model.params)
        loss = float(functional.cross_entropy(out, y, reduction="sum"))
        return {"loss": (loss, float(len(y))), "accuracy": (float((out.argmax(1) == y).sum()), float(len(y)))}

    @torch.no_grad()
    def pooled(self, order: Features, job: Job) -> tuple[Tensor, Tensor]:
        self.check(order.model)
        x, y = self.examples(job.client, order.split)
        return self.forward(order.model, order.model.params, x).features, y


def identity(shared: Sequence[Tree]) -> tuple[int, ...]:
    """Which arrays, by object."""
    return tuple(id(value) for tree in shared for value in tree.values())


def compatible(order: Order) -> tuple[object, ...]:
    """Orders with equal keys may share lanes. Values may differ per lane (params, others, constant weights, anchors,
    ranks), code and structure may not. That is why objectives, predictions and gates must compare by value."""

    def shape(model: Model) -> tuple[object, ...]:
        gate = model.weights if callable(model.weights) else None
        return (model.backbone, model.predict, gate, len(model.others), identity(model.shared))

    if not isinstance(order, Fit):
        return (type(order), shape(order.model), order.split)
    models = {"model": order.models} if isinstance(order.models, Model) else order.models
    train = tuple(sorted(order.train.items())) if isinstance(order.train, Mapping) else order.train
    structure = tuple((name, shape(model)) for name, model in sorted(models.items()))
    proximal = order.proximal is not None
    return (Fit, structure, train, order.batch_size, order.optimizer, order.objective, proximal, order.split)


def selects(selector: str, key: str) -> bool:
    if selector in ("A", "B", "C", "W"):
        return key.endswith(f"/{selector}") and not key.startswith("extra/")
    return key == selector or key.startswith(f"{selector}/")


def build(optimizer: Optimizer, chosen: Mapping[str, Mapping[str, Tensor]]) -> torch.optim.Optimizer:
    members: dict[tuple[float, float], list[Tensor]] = {}
    for tree in chosen.values():
        for key, value in tree.items():
            lr = next((rate for s, rate in optimizer.lrs if selects(s, key)), optimizer.lr)
            decay = 0.0 if any(selects(s, key) for s in optimizer.no_decay) else optimizer.weight_decay
            members.setdefault((lr, decay), []).append(value)
    groups = [{"params": found, "lr": lr, "weight_decay": decay} for (lr, decay), found in members.items()]
    if optimizer.name == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum)


def plan(count: int, order: Fit, generator: torch.Generator) -> list[Tensor]:
    """The batches of a fit: whole epochs, or exactly ``steps``."""
    if (order.epochs is None) == (order.steps is None):
        raise ValueError("a Fit has either epochs or steps")
    wanted = order.steps if order.steps is not None else (order.epochs or 0) * math.ceil(count / order.batch_size)
    batches: list[Tensor] = []
    while len(batches) < wanted:
        batches += torch.split(torch.randperm(count, generator=generator), order.batch_size)
    return batches[:wanted]


# ---------------------------------------------------------------- the world


def make_data(count: int, seed: int, size: int, skew: float) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Gaussian classes; every client has its own label shares. ``size`` is the smallest client's fit split."""
    centres = 1.3 * torch.randn(len(LABELS), INPUTS, generator=stream(seed, "centres"), dtype=torch.float64)
    data = {}
    for k in range(count):
        g = stream(seed, "client", k)
        shares = torch.rand(len(LABELS), generator=g) ** skew + 0.02

        def draw(n: int, g: torch.Generator = g, shares: Tensor = shares) -> tuple[Tensor, Tensor]:
            y = torch.multinomial(shares, n, replacement=True, generator=g)
            return centres[y] + torch.randn(n, INPUTS, generator=g, dtype=torch.float64), y

        data[f"c{k}"] = {"fit": draw(size + 7 * k), "holdout": draw(8), "test": draw(40)}
    return data


@dataclass
class Fleet:
    """A simulator with things that go wrong: clients that join late, lost replies, another order, a real wire."""

    inner: Simulator
    learner: Learner
    joins: Mapping[str, int]
    lost: Lost
    wire: bool
    backwards: bool

    @property
    def algorithm(self) -> Any:
        return self.inner.algorithm

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    @property
    def clients(self) -> Mapping[str, Client]:
        return self.inner.clients

    @property
    def stores(self) -> dict[str, Store]:
        return self.inner.stores

    def available(self, round: int) -> Sequence[Client]:
        return [client for client in self.inner.available(round) if self.joins.get(client.id, 1) <= round]

    def ask(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply | None]]:
        built = {name: requests[name] for name in sorted(requests, reverse=self.backwards)}
        fate = {name: self.lost(request.kind, request.round, name) for name, request in built.items()}
        for name in [name for name, when in fate.items() if when == "before"]:
            del built[name]
            yield name, None
        if self.wire:
            built = {name: travelled(request) for name, request in built.items()}
        for name, reply in self.inner.ask(built):
            if fate[name] == "after" or reply is None:
                yield name, None
            elif self.wire and reply.update is not None:
                arrays = decode(encode(reply.update.arrays))
                yield name, replace(reply, update=Update(arrays, reply.update.weight, reply.update.sums))
            else:
                yield name, reply


def travelled(request: Request) -> Request:
    """The request as it arrives from a wire."""
    judge = None if request.judge is None else Model.from_plain(decode(encode(request.judge.plain())))
    return replace(request, payload=decode(encode(request.payload)), judge=judge)


def make(
    algorithm: Algorithm[Any, Any, Any],
    *,
    mixed: bool = False,
    private: bool = False,
    seed: int = 0,
    count: int = 7,
    size: int = 24,
    skew: float = 3.0,
    dtype: torch.dtype = torch.float64,
    joins: Mapping[str, int] | None = None,
    lost: Lost = lambda kind, round, client: None,
    wire: bool = False,
    backwards: bool = False,
    lanes: int = 1,
    store: Callable[[str], Store] = RamMemory,
    stores: dict[str, Store] | None = None,
) -> Fleet:
    """A fresh fleet: mixed ranks and private backbones where the algorithm is for them."""
    whole = {"head/weight": (len(LABELS), WIDTH), "head/bias": (len(LABELS),), "norm/gain": (WIDTH,)}
    gain = {"norm/gain": torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64)}
    spec = ModelSpec(SITES, dict.fromkeys(SITES, 4), whole, LABELS, WIDTH, dtype=dtype, pretrained=gain)
    backbones = {
        "base": Backbone.make("base", HIDDEN, 1, True),
        "narrow": Backbone.make("narrow", 9, 2, False),
        "wide": Backbone.make("wide", 24, 3, False),
    }
    data = make_data(count, seed, size, skew)
    clients = {}
    for k, id in enumerate(sorted(data)):
        ranks = dict.fromkeys(SITES, (1, 2, 4)[k % 3] if mixed else 4)
        examples = sum(len(data[id][split][1]) for split in ("fit", "holdout"))
        clients[id] = Client(id, ranks, ("narrow", "wide")[k % 2] if private else "base", examples)
    learner = Learner(spec, backbones, data, seed)

    def facts(id: str) -> tuple[int, dict[str, int]]:
        _, y = learner.examples(id, "train")
        return len(y), {label: int((y == i).sum()) for i, label in enumerate(LABELS)}

    known = {} if stores is None else stores
    inner = Simulator(algorithm, spec, learner, clients, facts, seed, lanes, store, stores=known)
    return Fleet(inner, learner, joins or {}, lost, wire, backwards)
