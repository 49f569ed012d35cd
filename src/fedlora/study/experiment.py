"""From a configuration to everything that a run needs: data, base, algorithm, clients, and the fleet that runs them."""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedlora.adapters.algebra import adapter as adapter_of
from fedlora.adapters.algebra import ranks as ranks_of
from fedlora.adapters.peft import describe, fit_to, read, whole_of
from fedlora.data.population import Population, build, from_datasets
from fedlora.data.profiles import RankProfile, ranks
from fedlora.data.validation import Validated
from fedlora.engines.simulator import Simulator
from fedlora.errors import UserError
from fedlora.federation.algorithm import Algorithm
from fedlora.federation.memory import DiskMemory
from fedlora.federation.orders import Model
from fedlora.federation.rounds import evaluate
from fedlora.federation.sampling import Cohorts
from fedlora.federation.spec import Client, Extras, ModelSpec, Sums
from fedlora.learning.backbone import Backbone
from fedlora.learning.learner import Learner
from fedlora.learning.loading import load_backbone
from fedlora.learning.prepacked import prepacks
from fedlora.learning.tasks import Examples, Task
from fedlora.study import algorithm as algorithms
from fedlora.study import private
from fedlora.study.config import RunConfig
from fedlora.study.resolution import device_of, resolved
from fedlora.study.summary import Metric, class_prior
from fedlora.study.tasks import task_of

if TYPE_CHECKING:
    from fedlora.study.deploy import Adapters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
POOLED = "(all data pooled)"
EVERYONE = "(everyone)"
"""Whose test rows are everybody's."""
NO_ROWS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Terms:
    """What no participant of a federation can see alone.

    ``labels``: the label space; ``fields``: the columns of the data; ``most``: the largest rank served, by site;
    ``least``: the smallest client's; ``ranks``: each client's own, by site; ``models``: each client's backbone.
    """

    labels: tuple[str, ...]
    fields: tuple[str, ...]
    most: Mapping[str, int]
    least: int
    ranks: Mapping[str, Mapping[str, int]]
    models: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Experiment:
    """A run, ready to start. ``config`` is resolved: every default and every measured choice is written out.

    ``judged``: the clients that are scored; ``strangers``: those outside training.
    """

    config: RunConfig
    folder: Path
    population: Population
    backbone: Backbone
    task: Task
    examples: Examples
    spec: ModelSpec
    algorithm: Algorithm[Any, Any, Any]
    learner: Learner
    fleet: Simulator

    @property
    def judged(self) -> tuple[Client, ...]:
        """The clients that are scored on the way and at the end."""
        return tuple(self.fleet.clients[name] for name in self.population.seen)

    @property
    def strangers(self) -> tuple[Client, ...]:
        """Clients that never train."""
        return tuple(self.fleet.clients[name] for name in self.population.unseen)

    @property
    def run_id(self) -> str:
        """What client memories are filed under."""
        return "run"

    @property
    def sampler(self) -> Cohorts:
        """Who takes part in a round."""
        return Cohorts(self.config.training.clients_per_round)

    @property
    def metric(self) -> Metric:
        """The task's main score."""
        return Metric(*self.task.metric)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label space."""
        return self.population.labels

    @property
    def backbones(self) -> Mapping[str, Backbone]:
        """The models by name."""
        return self.learner.backbones

    @property
    def limits(self) -> None:
        """None: all participants are this process."""

    @property
    def shard(self) -> int | None:
        """How many clients are folded apart from the others; None: all at once."""
        return self.config.engine.shard

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a checkpoint belongs to: the data's hash, and the largest ranks served."""
        return {"population": self.population.digest, "ranks": dict(self.spec.ranks)}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know of the data beside the scores."""
        return self.population.warnings

    def adapters(self) -> Adapters:
        """Writes clients' adapters while they are scored."""
        from fedlora.study.deploy import Adapters  # it needs an experiment

        return Adapters(self)

    def observed(self) -> Mapping[str, Any]:
        """Nothing else is to be told of a round."""
        return {}

    def spent(self) -> tuple[int, Mapping[str, float]]:
        """Client-steps so far, and floating-point operations by client."""
        return self.learner.steps, dict(self.learner.meter.clients)

    @property
    def class_prior(self) -> Mapping[str, Any] | None:
        """What answering with each client's most frequent label scores; None where there are no labels."""
        if "label" not in self.population.fields:
            return None
        labels = np.asarray(self.population.table["label"][:])
        return class_prior(labels, {name: self.population.clients[name] for name in self.population.seen})

    def evaluate(
        self,
        checkpoint: Mapping[str, Any],
        clients: Iterable[Client],
        deploy: Callable[[str, Mapping[str, Model], Mapping[str, Sums]], None] | None = None,
    ) -> dict[str, dict[str, Sums]]:
        """Sums on the test data by client and variant, the deployed one first; ``deploy`` is told the models."""
        results: Iterator[tuple[str, dict[str, Sums]]] = evaluate(
            self.algorithm,
            checkpoint,
            replace(self.fleet, deploy=deploy),
            clients,
            total=self.config.training.rounds,
            run_id=self.run_id,
            splits=("test", "validation") if self.config.training.validate_rounds else ("test",),
        )
        return dict(results)


@contextmanager
def gradients() -> Generator[None]:
    """Training needs what a program may have switched off (a notebook's ``torch.set_grad_enabled(False)``)."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def assemble(
    config: RunConfig,
    folder: Path,
    *,
    model: Any = None,
    clients: Mapping[str, Any] | None = None,
    models: private.Modules | None = None,
    largest: Mapping[str, int] | None = None,
    backbone_of: str | None = None,
    population: Population | None = None,
    terms: Terms | None = None,
) -> Experiment:
    """Reads the data, loads the base, builds the algorithm, and settles every open choice of the configuration.

    ``models``: modules that ``[clients] models`` names. ``largest``: the clients given are newcomers to a finished run,
    which never train and have these ranks by site and the model ``backbone_of`` (None: the first). ``population`` and
    ``terms``: some clients of a federation, in one of its sites.
    """
    if population is None and clients is None:
        population = build(config.data, config.model.task)
    elif population is None:
        assert clients is not None
        population = from_datasets(clients, config.data, config.model.task, strangers=largest is not None)
    algorithm = algorithms.build(config)
    private.require_suitable(config, algorithm)
    backbone = base_of(config, population.labels, (models or {}).get(config.model.name) if model is None else model)
    wanted = None if terms is None else set(terms.models.values())
    backbones = {"base": backbone, **private.load(config, backbone, models, str(backbone.device), wanted)}
    task = task_of(config, population.labels, population.fields, *backbones.values())
    stores = private.encoded(task, population.table, backbones)
    private.require_representations(backbones, task, stores)
    examples = stores["base"]
    if terms is None:
        terms = terms_of(config, population, backbone, largest, backbone_of)
    algorithm = algorithms.settled(algorithm, terms.least)
    spec = specified(config, algorithm, backbone, terms)
    config = resolved(config, algorithm, population, backbone, task, examples, spec)
    for one in backbones.values():
        _prepare(one, config)
    lanes = int(config.engine.lanes)
    owned = Validated(population.clients, config.data.seed) if config.training.validate_rounds else population.clients
    members, splits, strangers = _members(algorithm, population, owned, examples, terms)
    learner = Learner(
        backbones,
        task,
        stores,
        splits,
        spec,
        config.seed,
        lanes=lanes,
        tokens=int(config.engine.tokens),
        own_labels=config.data.label_space == "client",
        dropout=config.adapter.dropout,
    )

    def store(client: str) -> DiskMemory:
        return DiskMemory(folder / "memories", client)

    fleet = Simulator(
        algorithm, spec, learner, members, learner.facts, config.seed, lanes, store, strangers=frozenset(strangers)
    )
    return Experiment(config, folder, population, backbone, task, examples, spec, algorithm, learner, fleet)


def _prepare(backbone: Backbone, config: RunConfig) -> None:
    """Type, prefix, checkpointing and packed weights as the resolved configuration has them."""
    backbone.to(DTYPES[config.model.dtype]).remember(config.engine.prefix)
    if config.engine.checkpointing:
        backbone.checkpoint()
    if config.engine.prepack:
        backbone.prepacked = prepacks(backbone.module)


def base_of(config: RunConfig, labels: Sequence[str], model: Any = None) -> Backbone:
    """The base that everybody shares, on the run's device."""
    backbone = load_backbone(
        config.model.name if model is None else model,
        config.model.task,
        labels=labels,
        pooling=config.model.pooling,
        targets=config.adapter.targets,
        layers=config.adapter.layers,
        bits=config.model.bits,
        adapt=config.adapter.targets != "auto" or algorithms.find(config.algorithm.name).adapts,
        device=device_of(config.engine.device),
        processor=getattr(model, "processor", None),
        seed=config.seed,
    )
    if backbone.processor is None and backbone.kind != "image-classification":
        raise UserError(
            f"the model given for [model] name = {config.model.name!r} has no tokenizer",
            "set it: model.processor = ...",
        )
    backbone.head_fits &= not config.clients.models  # heads of different models begin alike
    return backbone


def terms_of(
    config: RunConfig,
    population: Population,
    backbone: Backbone,
    largest: Mapping[str, int] | None = None,
    backbone_of: str | None = None,
) -> Terms:
    """What follows from all clients together."""
    names = [backbone_of] if backbone_of else config.clients.models
    ranks = dict.fromkeys(population.clients, largest) if largest is not None else _ranks(config, population, backbone)
    return Terms(
        population.labels,
        population.fields,
        {site: max(own[site] for own in ranks.values()) for site in backbone.sites},
        min(min(own.values(), default=1) for own in ranks.values()),
        ranks,
        private.assigned(names, population.clients),
    )


def specified(config: RunConfig, algorithm: Algorithm[Any, Any, Any], backbone: Backbone, terms: Terms) -> ModelSpec:
    """What all participants agree on before round 1."""
    extras: Extras = getattr(algorithm, "extras", Extras())
    alpha = config.adapter.alpha or 2.0 * max(terms.most.values(), default=1)
    wide = torch.float64 if config.model.dtype == "float64" else torch.float32
    spec = backbone.spec(terms.most, alpha, config.adapter.scaling, extras, wide)
    return _started(spec, config, algorithm, backbone, terms.ranks) if config.adapter.start else spec


def _ranks(config: RunConfig, population: Population, backbone: Backbone) -> dict[str, Mapping[str, int]]:
    """Every client's rank at every site, at most the site's smaller side; clients of one profile share a table."""
    profiles = ranks(config.clients.ranks or config.adapter.rank, list(population.clients), config.seed)
    sizes = {site: min(layer.out_features, layer.in_features) for site, layer in backbone.sites.items()}

    def table(profile: RankProfile) -> dict[str, int]:
        return {s: min(profile.attention if _attention(s) else profile.mlp, size) for s, size in sizes.items()}

    tables = {profile: table(profile) for profile in set(profiles.values())}
    return {name: tables[profile] for name, profile in profiles.items()}


def _attention(site: str) -> bool:
    return any(word in site.lower() for word in ("attn", "attention"))


def _members(
    algorithm: Algorithm[Any, Any, Any],
    population: Population,
    owned: Mapping[str, Mapping[str, np.ndarray]],
    examples: Examples,
    terms: Terms,
) -> tuple[dict[str, Client], Mapping[str, Mapping[str, np.ndarray]], set[str]]:
    """Clients by id, their rows, and those that never train. What is no federation trains one client that owns
    everybody's rows; the others are only scored.

    A client's registered examples are its training units (windows of long texts): what its updates may weigh.
    """

    def client(name: str, own: Mapping[str, int], rows: Mapping[str, np.ndarray]) -> Client:
        units = examples.count(rows.get("fit", NO_ROWS)) + examples.count(rows.get("holdout", NO_ROWS))
        return Client(name, own, terms.models.get(name, "base"), units or None)

    if taken := {POOLED, EVERYONE} & set(owned):
        raise UserError(f"a client is called {min(taken)!r}, which stands for all of them", "give it another id")
    unseen, members = set(population.unseen), dict[str, Client]()
    shared: defaultdict[str, list[np.ndarray]] = defaultdict(list)  # what everybody's model trains and is scored on
    for name, rows in owned.items():  # once: the rows of 100,000 clients are made on access
        members[name] = client(name, terms.ranks[name], rows)
        if name not in unseen:
            for part in ("test",) if algorithm.federated else rows:
                shared[part].append(rows.get(part, NO_ROWS))
    everyone = {part: np.concatenate(rows) for part, rows in shared.items()}
    known: Any = owned  # a ChainMap writes to its first map only
    splits: ChainMap[str, Mapping[str, np.ndarray]] = ChainMap(
        {EVERYONE: {"test": everyone.get("test", NO_ROWS)}}, known
    )
    if algorithm.federated:
        return members, splits, unseen
    whole = client(POOLED, terms.most, everyone)
    return {**members, POOLED: whole}, splits.new_child({POOLED: everyone}), set(members)


def _started(
    spec: ModelSpec,
    config: RunConfig,
    algorithm: Algorithm[Any, Any, Any],
    backbone: Backbone,
    by_site: Mapping[str, Mapping[str, int]],
) -> ModelSpec:
    """The specification with a PEFT folder's adapter (and head) as the start."""
    place = f"[adapter] from = {config.adapter.start!r}"
    if not algorithm.given_start:
        raise UserError(f"{place}: {config.algorithm.name} does not begin with one given adapter", "leave it out")
    tree = read(Path(str(config.adapter.start)), backbone.head_path)
    fit_to(tree, spec.sites, place)
    base = describe(backbone.module, backbone.name, head=backbone.head_path)
    tree = adapter_of(tree) | whole_of(tree, spec.whole, base, place)
    for site, rank in ranks_of(tree).items():
        for client, own in by_site.items():
            if own[site] < rank:
                raise UserError(
                    f"{place} has rank {rank} at {site}, client {client!r} rank {own[site]}",
                    "give [clients] ranks that hold it",
                )
    given = {name: value.to(spec.dtype) for name, value in tree.items()}
    if broken := sorted(name for name, value in given.items() if not bool(torch.isfinite(value).all())):
        raise UserError(f"{place}: {broken[0]} has numbers that are not finite", "give an adapter that did not diverge")
    return replace(spec, pretrained={**spec.pretrained, **given})
