"""A site's side of a run: its experiment, kept warm between messages, and its answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.engines.flower.messages import ASK, HELLO, Answer, Cost, Hello, Presence, Unreadable, request_of
from fedlora.engines.flower.split import share
from fedlora.errors import UserError
from fedlora.federation.algorithm import Request
from fedlora.federation.client import Executor, Job
from fedlora.federation.memory import quoted
from fedlora.federation.orders import Model
from fedlora.federation.spec import Sums
from fedlora.federation.wire import decode, encode
from fedlora.study import export
from fedlora.study.deploy import write_own
from fedlora.study.experiment import Experiment, assemble

log = logging.getLogger(__name__)
Stop = Callable[[], str | None]
"""Why to stop working, or None."""


class Stopped(Exception):
    """Nobody waits for this work any more."""


@dataclass(eq=False)
class Watched:
    """An executor that looks up between two units of work whether anybody still waits."""

    inner: Executor
    stop: Stop

    def submit(self, job: Job) -> int:
        return self.inner.submit(job)

    def advance(self) -> list[tuple[int, Any | Exception]]:
        if reason := self.stop():
            raise Stopped(reason)
        return self.inner.advance()

    @property
    def idle(self) -> bool:
        return self.inner.idle


@dataclass(eq=False)
class Resident:
    """One site. Its folder holds its data, its clients' memories and adapters, what it knows of runs (``runs/``)."""

    folder: Path
    runs: dict[str, Experiment] = field(default_factory=dict[str, Experiment])

    @property
    def name(self) -> str:
        """The site's name."""
        return self.folder.name

    def answer(self, kind: str, run: str, body: Any, stop: Stop) -> Any:
        """What to say to a question."""
        if kind == HELLO:
            return self.hello(Hello.from_plain(body)).plain()
        if kind == ASK:
            return [answer.plain() for answer in self.ask(run, body, stop)]
        raise Unreadable(f"a question of kind {kind!r}")

    # -- hello

    def hello(self, hello: Hello) -> Presence:
        """Gets ready for a run: says which clients are here, or why not."""
        try:
            experiment = self._ready(hello)
        except UserError as problem:
            log.warning("run %s is refused: %s", hello.run_id, problem)
            return Presence(self.name, refused=str(problem))
        self._remember(hello)
        clients = tuple(client for _, client in sorted(experiment.fleet.clients.items()))
        return Presence(self.name, clients, experiment.fleet.strangers)

    def _ready(self, hello: Hello) -> Experiment:
        known = self.runs.get(hello.run_id)
        if known is not None and known.config.replace(training={"rounds": 0}) == hello.config.replace(
            training={"rounds": 0}
        ):
            return known
        self.runs.clear()  # one base at a time
        own = share(self.folder, hello.terms.labels)
        terms = replace(hello.terms, ranks=own.ranks, models=own.models)
        log.info("run %s: %d clients, loading the base", hello.run_id, len(own.population.clients))
        experiment = assemble(hello.config, self.folder, population=own.population, terms=terms)
        self.runs[hello.run_id] = experiment
        return experiment

    def _remember(self, hello: Hello) -> None:
        """For a worker that is started anew while the run goes on."""
        file = self._file(hello.run_id)
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(encode(hello.plain()))
        temporary.replace(file)

    def _file(self, run: str) -> Path:
        return self.folder / "runs" / f"{quoted(run)}.safetensors"

    def experiment(self, run: str) -> Experiment:
        """The experiment of a run that this site has heard of; UserError of any other."""
        if run not in self.runs:
            if not self._file(run).exists():
                raise UserError(f"run {run!r} has not been introduced here")
            self._ready(Hello.from_plain(decode(self._file(run).read_bytes())))
        return self.runs[run]

    # -- ask

    def ask(self, run: str, body: Any, stop: Stop) -> list[Answer]:
        """Every client's answer. What went wrong at one is its problem; the others go on."""
        asked = [request_of(one) for one in body]
        try:
            experiment = self.experiment(run)
        except UserError as problem:
            return [Answer(name, None, str(problem)) for name, _, _ in asked]
        foreign = [name for name, _, _ in asked if name not in experiment.fleet.clients]
        requests = {name: request for name, request, _ in asked if name not in foreign}
        written = {name for name, _, write in asked if write}
        found = [Answer(name, None, f"no client {name!r} is here") for name in foreign]
        found += self._work(experiment, requests, written, stop)
        experiment.fleet.flush()
        return found

    def _work(
        self, experiment: Experiment, requests: Mapping[str, Request], written: set[str], stop: Stop
    ) -> Iterator[Answer]:
        learner = experiment.learner
        fleet = replace(
            experiment.fleet, executor=Watched(learner, stop), deploy=writer(experiment, written) if written else None
        )
        waiting = dict.fromkeys(sorted(requests))
        flops, steps, start = dict(learner.meter.clients), learner.steps, time.perf_counter()
        try:
            for name, reply in fleet.ask(requests):
                seconds, start = time.perf_counter() - start, time.perf_counter()
                spent = learner.meter.clients.get(name, 0.0) - flops.get(name, 0.0)
                cost, steps = Cost(seconds, learner.steps - steps, spent), learner.steps
                del waiting[name]
                yield Answer(name, reply, "" if reply else "its training failed: see the site's log", cost)
        except Stopped as reason:
            learner.forget()
            log.warning("stopped: %s", reason)
            yield from lost(list(waiting), f"stopped: {reason}")
        except Exception as problem:
            learner.forget()
            log.exception("a client program failed")
            text = str(problem) if isinstance(problem, UserError) else type(problem).__name__
            yield from lost(list(waiting), text)


def lost(names: Sequence[str], problem: str) -> Iterator[Answer]:
    """Answers of clients that have none."""
    for name in names:
        yield Answer(name, None, problem)


def writer(experiment: Experiment, names: set[str]) -> Callable[[str, Mapping[str, Model], Mapping[str, Sums]], None]:
    """Keeps the deployed models of some clients as adapter folders."""

    def deploy(client: str, models: Mapping[str, Model], sums: Mapping[str, Sums]) -> None:
        if client in names:
            deployed, model = next(iter(models.items()))
            place = experiment.folder / "adapters" / export.CLIENTS / quoted(client)
            write_own(experiment, place, model, client, experiment.metric.of(sums[deployed]))

    return deploy
