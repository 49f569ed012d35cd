"""The run's side: clients that are folded by actors (``study.host.Host``), on a private Ray or on a cluster."""

from __future__ import annotations

import itertools
import logging
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch

from fedlora.engines.ray.pool import Pool
from fedlora.engines.ray.worker import Start, Told, Worker, packed
from fedlora.errors import UserError
from fedlora.federation.algorithm import Algorithm
from fedlora.federation.exchange import Exchange, Partial, cut
from fedlora.federation.orders import Model
from fedlora.federation.sampling import Cohorts
from fedlora.federation.spec import Client, ModelSpec, Sums
from fedlora.federation.wire import decode
from fedlora.learning.backbone import Backbone
from fedlora.sites import agreement
from fedlora.study.config import EngineSettings, RunConfig, located
from fedlora.study.experiment import Experiment
from fedlora.study.summary import Metric

log = logging.getLogger(__name__)
SECONDS = 10.0
WAIT = "RAY_gcs_server_port_wait_time_s"
"""Ray's variable for how often it tries to reach a cluster, a second apart."""
TURNS = 4
"""The most shards of an actor in a round: one that is slow, or lost, leaves little for the others to wait for."""


@dataclass(frozen=True)
class Item:
    """Some clients, and what they are asked for."""

    what: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.names) - 5} more" if len(self.names) > 5 else ""
        return f"{self.what} of {', '.join(self.names[:5])}{more}"


@dataclass(eq=False)
class RayFleet:
    """Clients that any actor can serve. ``steps`` and ``flops``: what training took, each shard counted once."""

    experiment: Experiment
    pool: Pool
    tokens: Iterator[int] = field(default_factory=itertools.count)
    steps: int = 0
    flops: dict[str, float] = field(default_factory=dict[str, float])

    def available(self, round: int) -> Sequence[Client]:
        """Everybody but the strangers, in every round."""
        return self.experiment.fleet.available(round)

    def flush(self) -> None:
        """Nothing to do: memories are durable before a partial aggregate leaves its actor."""

    def partials(self, exchange: Exchange, shards: Sequence[Sequence[Client]]) -> Iterator[Partial]:
        """Every shard's accumulator and account, in the order of the shards."""
        send = self.sender(vars(exchange))

        def call(actor: Any, item: Item) -> Any:
            return actor.fold.options(num_returns=2).remote(*send, item.names)

        for told, large in self.pool.each(call, items(f"round {exchange.round} ({exchange.kind})", shards)):
            self.steps += told.steps
            for name, count in told.flops.items():
                self.flops[name] = self.flops.get(name, 0.0) + count
            repeat(told)
            yield Partial(decode(large.tobytes()), told.value)

    def scores(
        self, checkpoint: Mapping[str, Any], shards: Sequence[Sequence[Client]], write: bool
    ) -> Iterator[tuple[dict[str, dict[str, Sums]], dict[str, float | None]]]:
        """(sums by client and variant, deployed models' scores on everybody's data) of every shard."""
        known = {client.id for shard in shards for client in shard}
        acked = {name: version for name, version in checkpoint["acked"].items() if name in known}
        send = self.sender({"state": checkpoint["state"], "round": checkpoint["round"], "acked": acked})

        def call(actor: Any, item: Item) -> Any:
            return actor.score.options(num_returns=2).remote(*send, item.names, write)

        for told, _ in self.pool.each(call, items(f"round {checkpoint['round']} (evaluate)", shards)):
            repeat(told)
            yield told.value

    def sender(self, plain: Mapping[str, Any]) -> tuple[str, Any]:
        """A token and a reference: the value goes to each node once, not to each client."""
        return f"{next(self.tokens)}", ray.put(packed(plain))


def items(what: str, shards: Sequence[Sequence[Client]]) -> list[Item]:
    """What actors are given."""
    return [Item(what, tuple(client.id for client in shard)) for shard in shards]


def repeat(told: Told) -> None:
    """An actor's lines in the run's own log."""
    for level, name, text in told.said:
        logging.getLogger(name).log(level, "%s", text)


@dataclass(eq=False)
class AtActors:
    """Adapters are written by the actors that score them."""

    everyone: dict[str, float | None] = field(default_factory=dict[str, "float | None"])

    def __call__(self, client: str, models: Mapping[str, Model], sums: Mapping[str, Sums]) -> None:
        raise NotImplementedError("models do not travel: actors write them")

    def on_everyone(self) -> dict[str, float | None]:
        """Each deployed model's score on everybody's test data, where that was asked for."""
        return dict(sorted(self.everyone.items()))


@dataclass(frozen=True, eq=False)
class RayHost:
    """A run whose clients are trained by actors; the experiment here has the base and the data, but trains nobody."""

    experiment: Experiment
    fleet: RayFleet

    @property
    def config(self) -> RunConfig:
        """The resolved run file."""
        return self.experiment.config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.experiment.folder

    @property
    def algorithm(self) -> Algorithm[Any, Any, Any]:
        """The algorithm."""
        return self.experiment.algorithm

    @property
    def spec(self) -> ModelSpec:
        """What all agree on."""
        return self.experiment.spec

    @property
    def metric(self) -> Metric:
        """The task's main score."""
        return self.experiment.metric

    @property
    def labels(self) -> tuple[str, ...]:
        """The label space."""
        return self.experiment.labels

    @property
    def backbones(self) -> Mapping[str, Backbone]:
        """The models by name."""
        return self.experiment.backbones

    @property
    def run_id(self) -> str:
        """What client memories are filed under."""
        return self.experiment.run_id

    @property
    def sampler(self) -> Cohorts:
        """Who takes part in a round."""
        return self.experiment.sampler

    @property
    def judged(self) -> tuple[Client, ...]:
        """The clients that are scored."""
        return self.experiment.judged

    @property
    def strangers(self) -> tuple[Client, ...]:
        """Clients that never train."""
        return self.experiment.strangers

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a checkpoint belongs to."""
        return self.experiment.identity

    @property
    def limits(self) -> None:
        """None: all participants are our own."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know of the data beside the scores."""
        return self.experiment.warnings

    @property
    def class_prior(self) -> Mapping[str, Any] | None:
        """What answering with each client's most frequent label scores."""
        return self.experiment.class_prior

    @property
    def shard(self) -> int | None:
        """How many clients an actor is given at a time."""
        return self.experiment.shard

    def spent(self) -> tuple[int, Mapping[str, float]]:
        """What the actors have done."""
        return self.fleet.steps, dict(self.fleet.flops)

    def observed(self) -> Mapping[str, Any]:
        """Nothing else is to be told of a round."""
        return {}

    def adapters(self) -> AtActors:
        """Actors write what their clients deploy."""
        return AtActors()

    def evaluate(
        self, checkpoint: Mapping[str, Any], clients: Iterable[Client], deploy: AtActors | None = None
    ) -> dict[str, dict[str, Sums]]:
        """Sums on the test data by client and variant; with ``deploy`` the actors write what they score."""
        found: dict[str, dict[str, Sums]] = {}
        for sums, everyone in self.fleet.scores(checkpoint, cut(clients, self.shard), deploy is not None):
            found |= sums
            if deploy is not None:
                deploy.everyone |= everyone
        return found


@contextmanager
def connected(engine: EngineSettings) -> Iterator[None]:
    """A connection to Ray, ended with the run; one that the program already has is used and left as it is."""
    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if engine.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a private Ray tells nobody of itself
            cores = None if engine.actors is None else engine.actors * engine.threads
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        else:
            reach(engine.address)
            with one_attempt():
                ray.init(address=engine.address, **quiet)
    except (OSError, RuntimeError, ValueError) as problem:
        raise UserError(
            f"[engine] address = {engine.address!r}: {problem}",
            "start a cluster with `ray start --head`, with the same Python and Ray everywhere, or leave address out",
        ) from problem
    try:
        yield
    finally:
        ray.shutdown()


def reach(address: str) -> None:
    """An OSError at once where nobody listens at "host:port"; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), SECONDS).close()


@contextmanager
def one_attempt() -> Iterator[None]:
    """Where something else listens (the dashboard, say), Ray would take a quarter of an hour to give up: twenty times
    its own limit. Only meanwhile: a private Ray reads the same variable when it starts."""
    given = os.environ.get(WAIT)
    os.environ[WAIT] = given or "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ[WAIT]


def sized(engine: EngineSettings, gpu: bool, resources: Mapping[str, float]) -> int:
    """How many actors: as said, else one a GPU, else one for every ``threads`` cores.

    >>> engine = EngineSettings(threads=2)
    >>> sized(engine, False, {"CPU": 9.0}), sized(engine, True, {"CPU": 9.0, "GPU": 3.0}), sized(engine, False, {})
    (4, 3, 1)
    """
    fit = resources.get("GPU", 0.0) if gpu else resources.get("CPU", 0.0) // engine.threads
    return engine.actors or max(1, int(fit))


def shard_of(clients: int, actors: int, lanes: int) -> int:
    """Clients at a time, so that all actors have as many turns in a round, one to four, with full lanes or nearly so.

    >>> shard_of(1000, 2, 8), shard_of(20, 2, 8), shard_of(3, 2, 8), shard_of(0, 2, 8)
    (125, 5, 2, 1)
    """
    turns = min(TURNS, max(1, math.ceil(clients / (actors * lanes))))
    return max(1, math.ceil(clients / (turns * actors)))


@contextmanager
def hosted(experiment: Experiment, given: Mapping[str, Any]) -> Iterator[RayHost]:
    """The experiment with its clients at actors. ``given``: the objects that it was assembled from."""
    engine = experiment.config.engine
    gpu = torch.device(engine.device).type == "cuda"
    with connected(engine):
        actors = sized(engine, gpu, ray.cluster_resources())
        cohort = experiment.sampler(experiment.fleet.available(1), 1, experiment.config.seed)
        shard = engine.shard or shard_of(len(cohort), actors, int(engine.lanes))
        config = experiment.config.replace(engine={"shard": shard})
        if gpu:  # actors see one GPU each; the base here only says what is exported
            for backbone in experiment.backbones.values():
                backbone.to(device="cpu")
            torch.cuda.empty_cache()
        pool = Pool(*maker(experiment, config, given, gpu), actors, engine.join)
        log.info("%d actors, %d clients at a time", actors, shard)
        try:
            pool.open()
            yield RayHost(replace(experiment, config=config), RayFleet(experiment, pool))
        finally:
            pool.close()


def maker(
    experiment: Experiment, config: RunConfig, given: Mapping[str, Any], gpu: bool
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """What makes an actor, and what has it load."""
    own = config.replace(engine={"device": "cuda"}) if gpu else config
    plain = located(own.model_dump(by_alias=True), Path.cwd())  # actors may run in another folder
    folder, digest = experiment.folder.resolve(), experiment.population.digest
    start = ray.put(Start(plain, str(folder), dict(given), agreement.facts_of(experiment), digest))
    remote = ray.remote(num_cpus=config.engine.threads, num_gpus=int(gpu), max_restarts=0)(Worker)
    return remote.remote, lambda actor: actor.load.remote(start)
