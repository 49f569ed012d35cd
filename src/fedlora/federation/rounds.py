"""The one server loop. A generator: evaluation, checkpoints and early stopping are plain code around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora.federation.admission import Limits
from fedlora.federation.algorithm import Algorithm, Evaluated, Kind, Request
from fedlora.federation.exchange import Account, Exchange, Fleet, Requests, Sharded, cut, fold, in_order, merged
from fedlora.federation.sampling import Sampler, cohort
from fedlora.federation.spec import Client, ModelSpec, Sums
from fedlora.federation.wire import canonical


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


@dataclass(eq=False)
class Server:
    """What the loop knows. ``acked[id]`` is the version (round) of a client's memory whose reply was folded;
    ``durable`` is what the last durable checkpoint would ask clients for; ``norms`` are those of the last rounds'
    updates, by kind."""

    algorithm: Algorithm[Any, Any, Any]
    spec: ModelSpec
    fleet: Fleet | Sharded
    total: int
    run_id: str
    buffered: bool
    shard: int | None
    max_norm: float | None
    limits: Limits | None
    state: Any
    acked: dict[str, int]
    durable: dict[str, int]
    norms: dict[str, list[list[float]]]

    def exchange(self, kind: Kind, round: int, clients: Sequence[Client]) -> tuple[Any, Account]:
        """Asks clients and folds what they say, shard by shard: the aggregator's report (None: nothing to report)."""
        exchange = self.question(kind, round, clients)
        aggregator, shards = exchange.aggregator(self.algorithm), cut(clients, self.shard)
        fleet = self.fleet
        if isinstance(fleet, Sharded):
            partials = fleet.partials(exchange, shards)
        else:
            partials = (fold(exchange, self.algorithm, self.spec, fleet, shard, self.buffered) for shard in shards)
        whole = merged(aggregator, partials)
        account = whole.account
        for name in account.folded:
            self.acked[name] = round
        if self.limits is not None:
            self.norms = {**self.norms, kind: self.limits.kept(self.norms.get(kind, []), account.norms)}
        return (aggregator.report(whole.acc) if account.folded else None), account

    def question(self, kind: Kind, round: int, clients: Sequence[Client]) -> Exchange:
        """What is asked of these clients."""
        acked, durable = (
            {client.id: versions[client.id] for client in clients if client.id in versions}
            for versions in (self.acked, self.durable)
        )
        largest, normed = self.largest(kind), self.limits is not None
        return Exchange(self.run_id, kind, round, self.total, self.state, acked, durable, largest, normed)

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
    fleet: Fleet | Sharded,
    *,
    total: int,
    seed: int,
    run_id: str = "run",
    sampler: Sampler = cohort,
    resume: Mapping[str, Any] | None = None,
    buffered: bool = True,
    max_norm: float | None = None,
    limits: Limits | None = None,
    shard: int | None = None,
) -> Iterator[Report]:
    """Yields round 0 (after the introductions), then one report a round. ``resume``: an earlier report's checkpoint,
    which must be durable: clients delete what it does not ask for.

    An introduction before round t writes version t - 1 of a client's memory: a newcomer has no other of that round.
    ``buffered``: fold in the order of ids, so that the result does not depend on the order of replies, bit for bit.
    ``max_norm``: a limit on an update's norm (None: none); ``limits``: one that follows from the norms of the last
    rounds, which are part of the checkpoint. ``shard``: how many clients are folded apart from the others (None: all at
    once); a result depends on it in the last bits, but not on where they are folded.
    """
    state = canonical(algorithm.server_init(spec, seed)) if resume is None else resume["state"]
    acked: dict[str, int] = {} if resume is None else dict(resume["acked"])
    norms = {} if resume is None else dict(resume.get("norms", {}))
    server = Server(
        algorithm, spec, fleet, total, run_id, buffered, shard, max_norm, limits, state, acked, dict(acked), norms
    )
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
