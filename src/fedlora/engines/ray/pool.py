"""Actors that pull items. An item of an actor that is lost is given to another; results come in the items' order."""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from fedlora.errors import UserError

log = logging.getLogger(__name__)
LOST = (RayActorError, ObjectLostError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
"""An actor or its node has ended, or cannot be reached; what a program itself raises is a RayTaskError."""
ATTEMPTS, LOOK = 3, 1.0
Call = Callable[[Any, Any], tuple[Any, Any]]
"""(actor, item) -> references to a small and a large result."""


@dataclass(eq=False)
class Member:
    """An actor. ``where`` is empty until it has loaded."""

    number: int
    handle: Any
    where: str = ""

    def __str__(self) -> str:
        return f"actor {self.number} ({self.where or 'loading'})"


@dataclass(eq=False)
class Shift:
    """Items under way. ``waiting``: their numbers, a heap, so that what is merged first goes first; ``running``: by the
    reference to the small result; ``done``: results that wait for their turn, the large ones where they were made."""

    call: Call
    items: Sequence[Any]
    waiting: list[int]
    running: dict[Any, tuple[Member, int, Any]] = field(default_factory=dict[Any, tuple[Member, int, Any]])
    done: dict[int, tuple[Any, Any]] = field(default_factory=dict[int, tuple[Any, Any]])
    losses: Counter[int] = field(default_factory=Counter[int])

    def again(self, index: int, why: Exception) -> None:
        """An item must be done again, though not without end: it may be what ends the actors."""
        self.losses[index] += 1
        if self.losses[index] >= ATTEMPTS:
            raise UserError(
                f"{self.items[index]}: {ATTEMPTS} actors have ended over it, the last with {brief(why)}",
                "look for kills in the nodes' logs (memory: fewer lanes or actors), then `fedlora resume` the run",
            ) from why
        heapq.heappush(self.waiting, index)


@dataclass(eq=False)
class Pool:
    """So many actors, replaced as they are lost. ``make``: a fresh one; ``load``: has it load, a reference to where it
    is; ``patience``: seconds in which at least one must have loaded. ``loading``: also those that are asked whether
    they are still there."""

    make: Callable[[], Any]
    load: Callable[[Any], Any]
    wanted: int
    patience: float
    idle: list[Member] = field(default_factory=list[Member])
    loading: dict[Any, Member] = field(default_factory=dict[Any, Member])
    members: dict[int, Member] = field(default_factory=dict[int, Member])
    count: int = 0
    failures: int = 0
    since: float = 0.0

    def open(self) -> None:
        """Starts the actors and waits for the first; the others join as they come."""
        for _ in range(self.wanted):
            self.add()
        nothing = Shift(lambda actor, item: (None, None), [], [])
        while not self.idle:
            self.step(nothing)

    def close(self) -> None:
        """Ends them."""
        for member in list(self.members.values()):
            self.end(member)

    def add(self) -> None:
        """One actor more."""
        self.count += 1
        member = Member(self.count, self.make())
        self.members[member.number] = member
        self.loading[self.load(member.handle)] = member
        self.since = time.monotonic()

    def end(self, member: Member) -> None:
        """Ends an actor. One that seems lost too: if it only could not be reached, it must not write any more."""
        del self.members[member.number]
        ray.kill(member.handle)

    def replace(self, member: Member) -> None:
        """Another in its place."""
        self.end(member)
        self.add()

    def doubt(self) -> None:
        """Who has nothing to do must answer before it is given anything: it may have ended with the node of one that is
        lost, and an item that is given to such actors in turn would seem to be what ends them."""
        for member in self.idle:
            self.loading[member.handle.__ray_ready__.remote()] = member
        self.idle.clear()
        self.since = time.monotonic()

    def each(self, call: Call, items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """(small, large) results of all items, in the items' order; the large ones are fetched one at a time."""
        shift = Shift(call, items, list(range(len(items))))
        try:
            for turn in range(len(items)):
                while (found := self.fetched(shift, turn)) is None:
                    self.step(shift)
                yield found
                del found  # before the next one is fetched
        finally:
            for member, _, _ in shift.running.values():  # whoever asked has gone, the pool perhaps before
                if member.number in self.members:
                    self.end(member)

    def fetched(self, shift: Shift, turn: int) -> tuple[Any, Any] | None:
        """An item's results, if they are there."""
        if turn not in shift.done:
            return None
        small, large = shift.done.pop(turn)
        try:
            return small, ray.get(large)
        except LOST as problem:
            log.warning("the result of %s is lost with its node: %s", shift.items[turn], brief(problem))
            self.doubt()
            shift.again(turn, problem)
            return None

    def give(self, shift: Shift) -> None:
        """Gives what waits to those who have nothing to do."""
        while self.idle and shift.waiting:
            member, index = self.idle.pop(), heapq.heappop(shift.waiting)
            small, large = shift.call(member.handle, shift.items[index])
            shift.running[small] = member, index, large

    def step(self, shift: Shift) -> None:
        """Waits for somebody to finish, and gives out what waits."""
        self.give(shift)
        ready, _ = ray.wait([*shift.running, *self.loading], timeout=LOOK)
        for reference in ready:
            if reference in self.loading:
                self.loaded(self.loading.pop(reference), reference)
            else:
                self.finished(shift, reference)
        self.give(shift)  # before the head goes on to merge
        if not self.idle and not shift.running and time.monotonic() - self.since > self.patience:
            raise UserError(
                f"no actor was ready after {self.patience:.0f} s (wanted: {self.wanted})",
                "see `ray status` for what the cluster has free; [engine] actors, threads and join say what is asked",
            )

    def loaded(self, member: Member, reference: Any) -> None:
        """An actor has loaded, or has not; or it has said that it is still there."""
        try:
            answer = fetch(reference)
        except LOST as problem:
            self.failures += 1
            log.warning("%s is lost: %s", member, brief(problem))
            if self.failures >= ATTEMPTS * self.wanted:
                raise UserError(
                    f"{self.failures} actors have ended while they loaded, the last with {brief(problem)}",
                    "install the same fedlora on all nodes, and give the actors enough memory for a base each",
                ) from problem
            self.replace(member)
            return
        if not member.where:
            self.failures, member.where = 0, answer
            log.info("%s is ready", member)
        self.idle.append(member)

    def finished(self, shift: Shift, reference: Any) -> None:
        """An item is done, or its actor is lost."""
        member, index, large = shift.running.pop(reference)
        try:
            shift.done[index] = fetch(reference), large
        except LOST as problem:
            log.warning("%s is lost: %s is given to another (%s)", member, shift.items[index], brief(problem))
            self.replace(member)
            self.doubt()
            shift.again(index, problem)
            return
        self.idle.append(member)


def fetch(reference: Any) -> Any:
    """A result; what the program in the actor raised is raised here."""
    try:
        return ray.get(reference)
    except RayTaskError as problem:
        raise problem.cause from problem


def brief(problem: Exception) -> str:
    """The first line of what Ray says, which goes on for many."""
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"
