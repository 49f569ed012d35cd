"""The one server loop. A generator: evaluation, checkpoints and early stopping are plain code around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedlora.federation.admission import Limits, Refusal, fault, norm
from fedlora.federation.algorithm import Algorithm, Evaluated, Kind, Reply, Request, Update
from fedlora.federation.sampling import Sampler, cohort
from fedlora.federation.spec import Client, ModelSpec, Sums, Tree
from fedlora.federation.wire import canonical, frame_size

log = logging.getLogger(__name__)
NOTHING: Tree = {}
Asked = Mapping[str, Request]
"""Requests by client id, in sorted order; each is built when it is looked up (see ``Fleet.ask``)."""


class Fleet(Protocol):
    """The clients as the server reaches them."""

    def available(self, round: int) -> Sequence[Client]:
        """Who could take part in a round."""
        ...

    def ask(self, requests: Asked) -> Iterator[tuple[str, Reply | None]]:
        """The replies as they come, in any order; None: lost. A request is built when it is looked up: look it up
        once, when it is sent, and let go of it."""
        ...


@dataclass(frozen=True, eq=False)
class Report:
    """One finished round. ``checkpoint`` is plain values; call ``saved()`` once it is durable.

    ``bytes``: frames of payloads ("down") and updates ("up"); those of introductions apart ("setup_..."). ``clients``:
    the same of each client that was asked.
    ``measures``: what the server learnt about itself.
    """

    round: int
    checkpoint: Mapping[str, Any]
    folded: tuple[str, ...]
    lost: tuple[str, ...]
    rejected: Mapping[str, str]
    sums: Sums
    bytes: Mapping[str, int]
    clients: Mapping[str, Mapping[str, int]]
    measures: Mapping[str, float]
    saved: Callable[[], None] = field(repr=False)

    @property
    def state(self) -> Any:
        """The server's state after the round."""
        return self.checkpoint["state"]


class Requests(Mapping[str, Request]):
    """Requests by client id, sorted, each built when it is looked up: no two payloads need to be alive at once."""

    def __init__(self, clients: Iterable[Client], build: Callable[[Client], Request], introduced: bool = False) -> None:
        self.introduced = introduced  # then a version may be an introduction's, at which nothing was received
        self.clients = {client.id: client for client in sorted(clients, key=lambda client: client.id)}
        self.build = build
        self.sent: dict[str, int] = {}

    def __getitem__(self, name: str) -> Request:
        request = self.build(self.clients[name])
        if name not in self.sent:
            self.sent[name] = frame_size(unheld(request.payload, None if self.introduced else request.base_version))
        return request

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)


def unheld(payload: Tree, version: int | None) -> Tree:
    """What of a payload must travel to a client whose last acknowledged round is ``version``.

    A key "ROUND:NAME" is a change made after that round which never changes again: a client that took part in round v
    holds those made before it.

    >>> sorted(unheld({"head": 0, "000001:q": 1, "000002:q": 2, "000003:q": 3}, 2))
    ['000002:q', '000003:q', 'head']
    """
    if version is None:
        return payload
    return {key: value for key, value in payload.items() if ":" not in key or int(key.partition(":")[0]) >= version}


def once(replies: Iterable[tuple[str, Reply | None]], names: Iterable[str]) -> Iterator[tuple[str, Reply | None]]:
    """Every name exactly once: second answers and strangers' are dropped; who never answered comes last, as lost."""
    outstanding = set(names)
    for name, reply in replies:
        if name in outstanding:
            outstanding.remove(name)
            yield name, reply
    for name in sorted(outstanding):
        yield name, None


def in_order(replies: Iterable[tuple[str, Reply | None]], names: Iterable[str]) -> Iterator[tuple[str, Reply | None]]:
    """The reorder buffer: every name exactly once and in sorted order, holding back only what came too early.

    >>> list(in_order([("c", None), ("a", None), ("b", None)], "abc"))
    [('a', None), ('b', None), ('c', None)]
    """
    order = sorted(names)
    held: dict[str, Reply | None] = {}
    done = 0
    for name, reply in once(replies, order):
        held[name] = reply
        del reply  # a folded reply must be free before the next one comes
        while done < len(order) and order[done] in held:
            yield order[done], held.pop(order[done])
            done += 1


def merge_sums(a: Sums, b: Sums) -> dict[str, tuple[float, float]]:
    """Sums of the union.

    >>> merge_sums({"loss": (3.0, 2.0)}, {"loss": (1.0, 2.0), "hits": (1.0, 2.0)})
    {'hits': (1.0, 2.0), 'loss': (4.0, 4.0)}
    """
    nothing = (0.0, 0.0)
    pairs = {name: (a.get(name, nothing), b.get(name, nothing)) for name in sorted({*a, *b})}
    return {name: (x[0] + y[0], x[1] + y[1]) for name, (x, y) in pairs.items()}


@dataclass(eq=False)
class Account:
    """What became of one exchange."""

    folded: list[str] = field(default_factory=list[str])
    lost: list[str] = field(default_factory=list[str])
    rejected: dict[str, str] = field(default_factory=dict[str, str])
    sums: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    norms: list[float] = field(default_factory=list[float])
    up: dict[str, int] = field(default_factory=dict[str, int])
    down: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(eq=False)
class Server:
    """What the loop knows. ``acked[id]`` is the version (round) of a client's memory whose reply was folded;
    ``durable`` is what the last durable checkpoint would ask clients for; ``norms`` are those of the last rounds'
    updates, by kind."""

    algorithm: Algorithm[Any, Any, Any]
    spec: ModelSpec
    fleet: Fleet
    total: int
    run_id: str
    buffered: bool
    max_norm: float | None
    limits: Limits | None
    state: Any
    acked: dict[str, int]
    durable: dict[str, int]
    norms: dict[str, list[list[float]]]

    def request(self, kind: Kind, round: int, client: Client) -> Request:
        versions = (self.acked.get(client.id), self.durable.get(client.id))
        payload = NOTHING if kind == "introduce" else self.algorithm.broadcast(self.state, client, round)
        return Request(self.run_id, kind, round, self.total, *versions, payload)

    def exchange(self, kind: Kind, round: int, clients: Sequence[Client]) -> tuple[Any, Account]:
        """Asks, validates and folds one reply at a time: the aggregator's report (None: nothing to report)."""
        aggregator = self.algorithm.introduction if kind == "introduce" else self.algorithm.aggregator
        assert aggregator is not None
        requests = Requests(
            clients, lambda client: self.request(kind, round, client), self.algorithm.introduction is not None
        )
        account, acc = Account(), aggregator.zero()
        max_norm = self.largest(kind)
        for name, reply in (in_order if self.buffered else once)(self.fleet.ask(requests), requests):
            if reply is None or (reply.run_id, reply.kind, reply.round) != (self.run_id, kind, round):
                account.lost.append(name)
                continue
            client, update = requests.clients[name], reply.update
            problem = self.problem(kind, round, client, update, max_norm)
            if update is None or problem:
                account.rejected[name] = "no update" if problem is None else f"{problem.reason}: {problem.text}"
                log.warning("round %d: the update of client %r is dropped: %s", round, name, problem)
                continue
            acc = aggregator.accumulate(acc, client, update)
            account.sums = merge_sums(account.sums, update.sums)
            account.up[name] = frame_size(update.arrays)
            account.folded.append(name)
            if self.limits is not None:
                account.norms.append(norm(update.arrays))
            del reply, update
        account.down = dict(requests.sent)
        for name in account.folded:
            self.acked[name] = round
        if self.limits is not None:
            self.norms = {**self.norms, kind: self.limits.kept(self.norms.get(kind, []), account.norms)}
        return (aggregator.report(acc) if account.folded else None), account

    def problem(
        self, kind: Kind, round: int, client: Client, update: Update | None, max_norm: float | None
    ) -> Refusal | None:
        """Why an update must not be folded: what every algorithm refuses, then what this one does."""
        expected = self.algorithm.expects(self.state, client, round, kind)
        found = fault(update, expected, client, dtype=self.spec.dtype, max_norm=max_norm)
        if found is not None or update is None:
            return found
        text = self.algorithm.objection(self.state, client, update, kind)
        return None if text is None else Refusal("meaning", text)

    def largest(self, kind: Kind) -> float | None:
        """The largest norm let in, in this round."""
        by_history = None if self.limits is None else self.limits.norm(self.norms.get(kind, []))
        return min((limit for limit in (self.max_norm, by_history) if limit is not None), default=None)

    def introduce(self, round: int, clients: Sequence[Client]) -> Account:
        """Hears from those of the clients that the server does not know yet."""
        newcomers = [client for client in clients if client.id not in self.acked]
        if self.algorithm.introduction is None or not newcomers:
            return Account()
        value, account = self.exchange("introduce", round, newcomers)
        if account.folded:
            self.state = canonical(self.algorithm.server_introduce(self.state, value, round))
        return account

    def train(self, round: int, clients: Sequence[Client]) -> Account:
        """One round; who could not be introduced is not asked, and an empty round leaves the state as it was."""
        if self.algorithm.introduction is not None:
            clients = [client for client in clients if client.id in self.acked]
        value, account = self.exchange("train", round, clients)
        if account.folded:
            self.state = canonical(self.algorithm.server_update(self.state, value, round))
        return account

    def report(self, round: int, setup: Account, account: Account) -> Report:
        snapshot = dict(self.acked)

        def saved() -> None:
            self.durable = dict(snapshot)

        sent = {"up": account.up, "down": account.down, "setup_up": setup.up, "setup_down": setup.down}
        return Report(
            round,
            {"round": round, "state": self.state, "acked": snapshot, **({"norms": self.norms} if self.limits else {})},
            tuple(account.folded),
            (*setup.lost, *account.lost),
            {**setup.rejected, **account.rejected},
            account.sums,
            {way: sum(sizes.values()) for way, sizes in sent.items()},
            {
                name: {w: sent[w][name] for w in sent if name in sent[w]}
                for name in sorted({*setup.down, *account.down})
            },
            dict(self.algorithm.measures(self.state)),
            saved,
        )


def rounds(
    algorithm: Algorithm[Any, Any, Any],
    spec: ModelSpec,
    fleet: Fleet,
    *,
    total: int,
    seed: int,
    run_id: str = "run",
    sampler: Sampler = cohort,
    resume: Mapping[str, Any] | None = None,
    buffered: bool = True,
    max_norm: float | None = None,
    limits: Limits | None = None,
) -> Iterator[Report]:
    """Yields round 0 (after the introductions), then one report a round. ``resume``: an earlier report's checkpoint,
    which must be durable: clients delete what it does not ask for.

    An introduction before round t writes version t - 1 of a client's memory: a newcomer has no other of that round.
    ``buffered``: fold in the order of ids, so that the result does not depend on the order of replies, bit for bit.
    ``max_norm``: a limit on an update's norm (None: none); ``limits``: one that follows from the norms of the last
    rounds, which are part of the checkpoint.
    """
    state = canonical(algorithm.server_init(spec, seed)) if resume is None else resume["state"]
    acked: dict[str, int] = {} if resume is None else dict(resume["acked"])
    norms = {} if resume is None else dict(resume.get("norms", {}))
    server = Server(algorithm, spec, fleet, total, run_id, buffered, max_norm, limits, state, acked, dict(acked), norms)
    if resume is None:
        setup = server.introduce(0, fleet.available(1) if algorithm.introduce_everyone else [])
        yield server.report(0, setup, Account())
    for round in range(1 if resume is None else int(resume["round"]) + 1, total + 1):
        clients = sampler(fleet.available(round), round, seed)
        setup = server.introduce(round - 1, clients)
        yield server.report(round, setup, server.train(round, clients))


def evaluate(
    algorithm: Algorithm[Any, Any, Any],
    checkpoint: Mapping[str, Any],
    fleet: Fleet,
    clients: Iterable[Client],
    *,
    total: int,
    run_id: str = "run",
    splits: tuple[Evaluated, ...] = ("test",),
) -> Iterator[tuple[str, dict[str, Sums]]]:
    """(client id, sums by variant), in the order of ids, as they come; who is lost is left out.

    The first variant is what the client would deploy; "global" is the server's model, where there is one. Clients that
    never took part are introduced privately. Nothing is written anywhere.
    """
    state, round, acked = checkpoint["state"], int(checkpoint["round"]), checkpoint["acked"]
    judge = algorithm.server_model(state)

    def build(client: Client) -> Request:
        payload = algorithm.broadcast(state, client, round)
        return Request(run_id, "evaluate", round, total, acked.get(client.id), None, payload, judge, splits)

    requests = Requests(clients, build)
    for name, reply in in_order(fleet.ask(requests), requests):
        if reply is not None and reply.sums is not None:
            yield name, dict(reply.sums)
