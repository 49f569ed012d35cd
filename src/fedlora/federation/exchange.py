"""One exchange: many clients are asked, their replies judged and folded. It runs wherever the clients are.

What the server asks is a plain value (``Exchange``), and what comes back of some clients is one accumulator with an
account (``Partial``), so that clients can be folded in parts, on other machines too: replies need not travel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from fedlora.federation.admission import Refusal, fault, norm
from fedlora.federation.algorithm import Aggregator, Algorithm, Kind, Reply, Request, Update
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
    """What became of the clients of an exchange; ``norms``: of the updates folded; ``up``, ``down``: bytes."""

    folded: list[str] = field(default_factory=list[str])
    lost: list[str] = field(default_factory=list[str])
    rejected: dict[str, str] = field(default_factory=dict[str, str])
    sums: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    norms: list[float] = field(default_factory=list[float])
    up: dict[str, int] = field(default_factory=dict[str, int])
    down: dict[str, int] = field(default_factory=dict[str, int])


def merge_accounts(a: Account, b: Account) -> Account:
    """The account of both: no client is in both."""
    return Account(
        [*a.folded, *b.folded],
        [*a.lost, *b.lost],
        {**a.rejected, **b.rejected},
        merge_sums(a.sums, b.sums),
        [*a.norms, *b.norms],
        {**a.up, **b.up},
        {**a.down, **b.down},
    )


@dataclass(frozen=True, eq=False)
class Exchange:
    """What is asked of some clients, and by what their replies are judged: plain values (``vars``).

    ``state``: the server's; ``acked``, ``durable``: the memory versions of those asked (see ``Request``); ``max_norm``:
    the largest norm let in; ``normed``: whether the norms of what is folded are wanted.
    """

    run_id: str
    kind: Kind
    round: int
    total: int
    state: Any
    acked: Mapping[str, int]
    durable: Mapping[str, int]
    max_norm: float | None = None
    normed: bool = False

    def request(self, algorithm: Algorithm[Any, Any, Any], client: Client) -> Request:
        """What one client is asked."""
        versions = (self.acked.get(client.id), self.durable.get(client.id))
        payload = NOTHING if self.kind == "introduce" else algorithm.broadcast(self.state, client, self.round)
        return Request(self.run_id, self.kind, self.round, self.total, *versions, payload)

    def problem(
        self, algorithm: Algorithm[Any, Any, Any], spec: ModelSpec, client: Client, update: Update | None
    ) -> Refusal | None:
        """Why an update must not be folded: what every algorithm refuses, then what this one does."""
        expected = algorithm.expects(self.state, client, self.round, self.kind)
        found = fault(update, expected, client, dtype=spec.dtype, max_norm=self.max_norm)
        if found is not None or update is None:
            return found
        text = algorithm.objection(self.state, client, update, self.kind)
        return None if text is None else Refusal("meaning", text)

    def aggregator(self, algorithm: Algorithm[Any, Any, Any]) -> Aggregator[Any, Any]:
        """What the updates are folded by."""
        found = algorithm.introduction if self.kind == "introduce" else algorithm.aggregator
        assert found is not None
        return found


@dataclass(frozen=True, eq=False)
class Partial:
    """What some clients came to: an accumulator (zero, if none of them was folded) and their account."""

    acc: Any
    account: Account


@runtime_checkable
class Sharded(Protocol):
    """Clients that are folded where they are: no reply reaches the server."""

    def available(self, round: int) -> Sequence[Client]:
        """Who could take part in a round."""
        ...

    def partials(self, exchange: Exchange, shards: Sequence[Sequence[Client]]) -> Iterator[Partial]:
        """Every shard's (see ``fold``), in the order of the shards."""
        ...


def cut(clients: Iterable[Client], size: int | None) -> list[list[Client]]:
    """Clients in the order of ids, ``size`` at a time (None: all at once), whatever machines there are.

    >>> [[client.id for client in shard] for shard in cut([Client(id, {}) for id in "cab"], 2)]
    [['a', 'b'], ['c']]
    """
    order = sorted(clients, key=lambda client: client.id)
    step = size or max(1, len(order))
    return [order[i : i + step] for i in range(0, len(order), step)]


def fold(
    exchange: Exchange,
    algorithm: Algorithm[Any, Any, Any],
    spec: ModelSpec,
    fleet: Fleet,
    clients: Iterable[Client],
    buffered: bool = True,
) -> Partial:
    """Asks, validates and folds one reply at a time; ``buffered``: in the order of ids, whatever that of replies."""
    aggregator = exchange.aggregator(algorithm)
    introduced = algorithm.introduction is not None
    requests = Requests(clients, lambda client: exchange.request(algorithm, client), introduced)
    account, acc = Account(), aggregator.zero()
    for name, reply in (in_order if buffered else once)(fleet.ask(requests), requests):
        echo = (exchange.run_id, exchange.kind, exchange.round)
        if reply is None or (reply.run_id, reply.kind, reply.round) != echo:
            account.lost.append(name)
            continue
        client, update = requests.clients[name], reply.update
        problem = exchange.problem(algorithm, spec, client, update)
        if update is None or problem:
            account.rejected[name] = "no update" if problem is None else f"{problem.reason}: {problem.text}"
            log.warning("round %d: the update of client %r is dropped: %s", exchange.round, name, problem)
            continue
        acc = aggregator.accumulate(acc, client, update)
        account.sums = merge_sums(account.sums, update.sums)
        account.up[name] = frame_size(update.arrays)
        account.folded.append(name)
        if exchange.normed:
            account.norms.append(norm(update.arrays))
        del reply, update  # before the next one comes
    account.down = dict(requests.sent)
    return Partial(acc, account)


def merged(aggregator: Aggregator[Any, Any], partials: Iterable[Partial]) -> Partial:
    """All parts as one, merged in their order, one at a time; each as it would have travelled."""
    acc, account = aggregator.zero(), Account()
    for part in partials:
        if part.account.folded:
            acc = aggregator.merge(acc, canonical(part.acc)) if account.folded else canonical(part.acc)
        account = merge_accounts(account, part.account)
    return Partial(acc, account)
