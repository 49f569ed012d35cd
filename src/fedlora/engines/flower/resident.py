"""A site's side of a run: ready between messages, it answers the server's questions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora.engines.flower.messages import ASK, HELLO, Answer, Cost, Hello, Presence, Unreadable, request_of
from fedlora.engines.flower.ready import Ready, ready, site_name
from fedlora.errors import UserError
from fedlora.federation.algorithm import Reply, Request
from fedlora.federation.client import Executor, Job
from fedlora.federation.memory import quoted
from fedlora.federation.wire import decode, encode
from fedlora.sites.guard import Guarded, leaving, outgoing

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
    """One site. Its folder holds its data, its clients' memories and adapters, what it knows of runs (``runs/``).

    ``prepare``: loads what a run needs, once; one run at a time is held.
    """

    folder: Path
    prepare: Callable[[Path, Hello], Ready] = ready
    runs: dict[str, tuple[Hello, Ready]] = field(default_factory=dict[str, tuple[Hello, Ready]])
    sent: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """The round of the last update that left, by run and client."""

    @property
    def name(self) -> str:
        """The site's name."""
        return site_name(self.folder)

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
            presence = self._ready(hello).presence
        except UserError as problem:
            log.warning("run %s is refused: %s", hello.run_id, problem)
            return Presence(self.name, refused=str(problem))
        file = self._file(hello.run_id)
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(encode(hello.plain()))  # for a worker that is started anew while the run goes on
        temporary.replace(file)
        return presence

    def _ready(self, hello: Hello) -> Ready:
        known = self.runs.get(hello.run_id)
        if known is not None and known[0].plain() == hello.plain():
            return known[1]
        self.runs.clear()  # one base at a time
        log.info("run %s: loading", hello.run_id)
        found = self.prepare(self.folder, hello)
        self.runs[hello.run_id] = hello, found
        log.info("run %s: ready with %d clients", hello.run_id, len(found.presence.clients))
        return found

    def _file(self, run: str) -> Path:
        return self.folder / "runs" / f"{quoted(run)}.safetensors"

    def known(self, run: str) -> Ready:
        """A run that this site has heard of; UserError of any other."""
        if run not in self.runs:
            if not self._file(run).exists():
                raise UserError(f"run {run!r} has not been introduced here")
            self._ready(Hello.from_plain(decode(self._file(run).read_bytes())))
        return self.runs[run][1]

    # -- ask

    def kept(self, run: str, name: str, array: Tensor | None) -> Tensor:
        """Keeps an array that never changes again, or (None) finds it: LookupError where it is gone."""
        file = self.folder / "held" / quoted(run) / f"{quoted(name)}.safetensors"
        if array is None:
            if not file.exists():
                raise LookupError(f"{file} is gone")
            return decode(file.read_bytes())["array"]
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            temporary.write_bytes(encode({"array": array}))
            temporary.replace(file)
        return array

    def ask(self, run: str, body: Any, stop: Stop) -> list[Answer]:
        """Every client's answer. What went wrong at one is its problem; the others go on."""
        asked = [request_of(one, partial(self.kept, run)) for one in body]
        try:
            here = self.known(run)
        except UserError as problem:
            return [Answer(name, None, str(problem)) for name, _, _ in asked]
        requests = {name: request for name, request, _ in asked if name in here.fleet.clients}
        written = {name for name, _, write in asked if write}
        for name, request in requests.items():
            self._look_back(run, name, request)
        found = [Answer(name, None, "it is not at this site") for name, _, _ in asked if name not in requests]
        found += work(here, requests, written, stop)
        here.fleet.flush()
        self.sent |= {(run, a.client): a.reply.round for a in found if a.reply is not None and a.reply.update}
        return found

    def _look_back(self, run: str, name: str, request: Request) -> None:
        """Says where an update was for nothing: the server asks for a version of the client before it."""
        last = self.sent.get((run, name))
        if last is None:
            return
        if request.kind != "evaluate" and request.round <= last:  # it is where it was before: it was started again
            del self.sent[run, name]
        elif request.round >= last and (request.base_version is None or request.base_version < last):
            log.warning(
                "client %r: the server did not take its update of round %d: it came late or was refused (metrics.jsonl "
                "of the server's run says which)",
                name,
                last,
            )
            del self.sent[run, name]


def work(here: Ready, requests: Mapping[str, Request], written: set[str], stop: Stop) -> Iterator[Answer]:
    """Every request's answer; memories are written, and durable once the fleet is flushed."""
    executor: Executor = here.fleet.executor
    if here.allow is not None:
        guarded = Guarded(
            executor, here.allow, examples=lambda name: here.fleet.facts(name)[0], abandon=here.learner.forget
        )
        for name in requests:
            guarded.begin(name)
        executor = guarded
    fleet = replace(here.fleet, executor=Watched(executor, stop), deploy=here.writer(written) if written else None)
    waiting, start, (steps, flops) = dict.fromkeys(sorted(requests)), time.perf_counter(), here.spent()
    try:
        for name, reply in fleet.ask(requests):
            now, (done, counts) = time.perf_counter(), here.spent()
            cost = Cost(now - start, done - steps, counts.get(name, 0.0) - flops.get(name, 0.0))
            start, steps = now, done
            del waiting[name]
            yield checked(here, name, reply, cost)
    except Exception as problem:
        here.learner.forget()
        if isinstance(problem, Stopped):
            log.warning("stopped: %s", problem)
        else:
            log.exception("a client program failed")
        # the text of any other error may hold what nobody outside may read
        text = str(problem) if isinstance(problem, (Stopped, UserError)) else type(problem).__name__
        yield from (Answer(name, None, text) for name in waiting)


def checked(here: Ready, name: str, reply: Reply | None, cost: Cost) -> Answer:
    """A client's answer, if its site lets it leave."""
    if reply is None:
        return Answer(name, None, "its training failed or was beyond the site's limits: see the site's log", cost)
    if here.allow is not None and (reason := outgoing(here.allow, reply)):
        log.warning("client %r: %s", name, reason)
        return Answer(name, None, reason, cost)
    log.info("leaves %s", leaving(name, reply))
    return Answer(name, reply, "", cost)
