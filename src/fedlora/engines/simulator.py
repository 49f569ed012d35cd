"""Many clients in one process: drives the same client programs as a deployed site, several at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from fedlora.federation.algorithm import Algorithm, Reply, Request
from fedlora.federation.client import Executor, Job, Program, handle, personalized
from fedlora.federation.memory import RamMemory, Store
from fedlora.federation.orders import Model
from fedlora.federation.spec import Client, Local, ModelSpec, Sums

log = logging.getLogger(__name__)
WINDOW = 32  # no client starts further ahead of the slowest: it bounds what the server's reorder buffer holds


@dataclass(eq=False)
class Running:
    """A client program held at a yield: the tickets it waits for, and their results so far."""

    program: Program
    tickets: list[int] = field(default_factory=list[int])
    results: dict[int, Any] = field(default_factory=dict[int, Any])

    def resume(self, answers: tuple[Any, ...] | None, executor: Executor) -> Reply | None:
        """Goes on to the next orders and submits them (None), or to the end (the reply)."""
        try:
            jobs = self.program.send(answers)
            while not jobs:  # an empty tuple of orders
                jobs = self.program.send(())
        except StopIteration as end:
            return end.value
        self.tickets, self.results = [executor.submit(job) for job in jobs], {}
        return None


@dataclass(eq=False)
class Simulator:
    """A fleet. Up to ``lanes`` programs are held at their yields; their jobs go to one executor, which may run those of
    several clients together. When a program ends, the next client takes its place.

    ``facts(id)`` is (number of training examples, counts by label). ``strangers`` can be asked, but never take part.
    ``deploy(id, models, sums)`` is told the models of every evaluation.
    """

    algorithm: Algorithm[Any, Any, Any]
    spec: ModelSpec
    executor: Executor
    clients: Mapping[str, Client]
    facts: Callable[[str], tuple[int, Mapping[str, int]]]
    run_seed: int
    lanes: int = 1
    store: Callable[[str], Store] = RamMemory
    strangers: frozenset[str] = frozenset()
    deploy: Callable[[str, Mapping[str, Model], Mapping[str, Sums]], None] | None = None
    stores: dict[str, Store] = field(default_factory=dict[str, Store])
    asked: set[str] = field(init=False, default_factory=set[str])  # since the last flush

    def available(self, round: int) -> Sequence[Client]:
        """Everybody but the strangers, in every round."""
        return self.members

    @cached_property
    def members(self) -> tuple[Client, ...]:
        """Those that train, by id: sorted once, since there may be very many."""
        return tuple(self.clients[name] for name in sorted(self.clients) if name not in self.strangers)

    def flush(self) -> None:
        """Makes all client memories durable: before a checkpoint is saved. Only of those asked since the last time:
        in the end there may be very many."""
        for name in sorted(self.asked):
            self.stores[name].flush()
        self.asked.clear()

    def program(self, name: str, request: Request) -> Program:
        """The client's side of a request."""
        deploy = None if self.deploy is None else partial(self.deploy, name)
        return handle(self.algorithm, request, *self.at(name, request), deploy)

    def at(self, name: str, request: Request) -> tuple[Store, Local]:
        """Where a client's program runs: its memory, and what it knows."""
        if name not in self.stores:
            self.stores[name] = self.store(name)
        self.asked.add(name)
        client, (examples, counts) = self.clients[name], self.facts(name)
        local = Local(client, self.spec, request.round, request.rounds, self.run_seed, examples, counts)
        return self.stores[name], local

    def models(self, name: str, request: Request) -> dict[str, Model]:
        """The models that an evaluation request would score, by variant, the deployed one first."""
        program = personalized(self.algorithm, request, *self.at(name, request))
        answers: tuple[Any, ...] | None = None
        while True:
            try:
                jobs = program.send(answers)
            except StopIteration as end:
                return end.value
            answers = self.alone(jobs)

    def alone(self, jobs: Sequence[Job]) -> tuple[Any, ...]:
        """The results of some jobs while nobody else waits; a failed one raises."""
        tickets = [self.executor.submit(job) for job in jobs]
        results: dict[int, Any] = {}
        while not results.keys() >= set(tickets):  # it may still hold jobs of a client that was lost
            if self.executor.idle:
                raise RuntimeError("the executor has nothing to do, but a job is not done")
            results.update(self.executor.advance())
        answers = tuple(results[ticket] for ticket in tickets)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def ask(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply | None]]:
        """Starts clients in the mapping's order. One whose job failed is lost and the reason logged; the others go on.
        What a client program itself raises is an error of the run and ends it."""
        names, running, owner = list(requests), dict[str, Running](), dict[int, str]()
        started = ended = 0
        try:
            while ended < len(names):
                while started < min(len(names), ended + max(WINDOW, self.lanes)) and len(running) < self.lanes:
                    name = names[started]
                    started += 1
                    running[name] = Running(self.program(name, requests[name]))
                    yield from self.proceed(name, None, running, owner)
                for ticket, result in self.advance(running):
                    name = owner.pop(ticket, "")
                    if name not in running:  # a job of a client that is lost already
                        continue
                    one = running[name]
                    if isinstance(result, Exception):
                        log.warning("client %r is lost: %s: %s", name, type(result).__name__, result)
                        running.pop(name).program.close()
                        yield name, None
                        continue
                    one.results[ticket] = result
                    if len(one.results) == len(one.tickets):
                        answers = tuple(one.results[ticket] for ticket in one.tickets)
                        yield from self.proceed(name, answers, running, owner)
                while ended < started and names[ended] not in running:
                    ended += 1
        finally:
            for one in running.values():
                one.program.close()

    def proceed(
        self, name: str, answers: tuple[Any, ...] | None, running: dict[str, Running], owner: dict[int, str]
    ) -> Iterator[tuple[str, Reply | None]]:
        """Resumes one program; yields its reply if that was its end."""
        reply = running[name].resume(answers, self.executor)
        if reply is not None:
            del running[name]
            yield name, reply
        else:
            owner.update(dict.fromkeys(running[name].tickets, name))

    def advance(self, running: Mapping[str, Running]) -> list[tuple[int, Any | Exception]]:
        """One unit of the executor's work, if anybody waits for any."""
        if not running:
            return []
        if self.executor.idle:
            raise RuntimeError(f"the executor has nothing to do, but clients wait: {sorted(running)}")
        return self.executor.advance()
