"""The one client entry point: what happens to a request, wherever the client lives."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from fedlora.federation.algorithm import Algorithm, Reply, Request, Update
from fedlora.federation.memory import Store
from fedlora.federation.orders import Features, Fit, Model, Order, Score, Work, scores
from fedlora.federation.spec import Local, Sums, derive
from fedlora.federation.wire import canonical


@dataclass(frozen=True, eq=False)
class Job:
    """An order with its random stream: (run seed, kind of request, round, client, order index)."""

    order: Order
    seed: int
    client: str


class Executor(Protocol):
    """What does the work that client programs ask for, of several clients at a time perhaps."""

    def submit(self, job: Job) -> int:
        """Takes a job; the ticket names its result."""
        ...

    def advance(self) -> list[tuple[int, Any | Exception]]:
        """One unit of work; the tickets that it finished with their results (an exception: this job failed)."""
        ...

    @property
    def idle(self) -> bool:
        """No job is waiting or running."""
        ...


Program = Generator[tuple[Job, ...], tuple[Any, ...] | None, Reply]
"""Yields tuples of jobs, expects tuples of results, returns the reply."""


def numbered(work: Work[Any], local: Local, kind: str, trusted: bool = False) -> Generator[tuple[Job, ...], Any, Any]:
    """Drives a client program: gives every order its stream and refuses what a program may not ask.

    The program is closed however this ends.
    """
    if not hasattr(work, "send"):
        raise TypeError(f"a client program is a generator (`yield from` what it asks), not a {type(work).__name__}")
    answer: Any = None
    index = 0
    try:
        while True:
            try:
                asked = work.send(answer)
            except StopIteration as end:
                return end.value
            orders: tuple[Any, ...] = cast(tuple[Any, ...], asked) if isinstance(asked, tuple) else (asked,)
            for order in orders:
                if not isinstance(order, (Fit, Score, Features)):
                    raise TypeError(f"a client program yields Fit, Score or Features, not {type(order).__name__}")
                if order.split in ("test", "validation") and not trusted:
                    raise PermissionError(f"an algorithm may not touch the {order.split} split")
            jobs = tuple(
                Job(order, derive(local.run_seed, kind, local.round, local.client.id, index + i), local.client.id)
                for i, order in enumerate(orders)
            )
            index += len(jobs)
            answers = yield jobs
            answer = answers if isinstance(asked, tuple) else answers[0]
    finally:
        work.close()


def sent(update: Update | None) -> Update | None:
    """The update as a wire would carry it."""
    return None if update is None else replace(update, arrays=canonical(update.arrays))


Deploy = Callable[[Mapping[str, Model], Mapping[str, Sums]], None]
"""Told the models that an evaluation has scored, by variant, the deployed one first, and their sums: where a client's
adapter is written."""


def handle(
    algorithm: Algorithm[Any, Any, Any], request: Request, store: Store, local: Local, deploy: Deploy | None = None
) -> Program:
    """Answers a request. The new memory is stored before the reply leaves; an evaluation stores nothing.

    An introduction is a function of the client alone: its streams are those of round 0 whenever it runs, at a real
    introduction, before a first training, or privately for the evaluation of a stranger.
    """
    keep = {request.base_version, request.keep_from}
    echo = (request.run_id, request.kind, request.round)
    first, payload = replace(local, round=0), canonical(request.payload)
    if request.kind == "introduce":
        update, memory = yield from numbered(algorithm.client_init(first), first, "introduce")
        store.write(request.run_id, request.round, memory, keep)
        return Reply(*echo, sent(update))
    if request.kind == "evaluate":
        return Reply(*echo, sums=(yield from evaluated(algorithm, request, store, local, deploy)))
    if request.base_version is None and algorithm.introduction is not None:
        raise ValueError(f"client {local.client.id} was asked to train before its introduction was acknowledged")
    memory = yield from remembered(algorithm, request, store, local)
    update, memory = yield from numbered(algorithm.client_update(payload, memory, local), local, "train")
    store.write(request.run_id, request.round, memory, keep)
    return Reply(*echo, sent(update))


def remembered(algorithm: Algorithm[Any, Any, Any], request: Request, store: Store, local: Local) -> Work[Any]:
    """The memory that a request starts from; a client without one gets its first, which nobody stores."""
    if request.base_version is not None:
        return store.read(request.run_id, request.base_version)
    first = replace(local, round=0)
    _, memory = yield from numbered(algorithm.client_init(first), first, "introduce")
    return memory


def personalized(
    algorithm: Algorithm[Any, Any, Any], request: Request, store: Store, local: Local
) -> Work[dict[str, Model]]:
    """The models that an evaluation request is about, by variant, the deployed one first."""
    memory = yield from remembered(algorithm, request, store, local)
    payload = canonical(request.payload)
    return dict((yield from numbered(algorithm.personalize(payload, memory, local), local, "evaluate")))


def evaluated(
    algorithm: Algorithm[Any, Any, Any], request: Request, store: Store, local: Local, deploy: Deploy | None
) -> Work[dict[str, Sums]]:
    """The sums of every variant, and of the server's model as "global"."""
    judged = yield from personalized(algorithm, request, store, local)
    if request.judge is not None:
        judged["global"] = request.judge  # a later key never moves the first
    found: dict[str, Sums] = {variant: {} for variant in judged}
    orders = scores(*(Score(model, split) for split in request.splits for model in judged.values()))
    results = yield from numbered(orders, local, "score", trusted=True)
    for (split, variant), sums in zip(((s, v) for s in request.splits for v in judged), results, strict=True):
        named = sums if split == request.splits[0] else {f"{split}/{name}": pair for name, pair in sums.items()}
        found[variant] = {**found[variant], **named}
    if deploy is not None:
        deploy(judged, found)
    return found
