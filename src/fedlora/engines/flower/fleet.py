"""The clients of a federation, as the server reaches them through Flower's Grid: a fleet (``federation.rounds``).

Every question carries a fresh nonce and its round; an answer counts once, from the node that was asked, with the
question's nonce. What comes late, twice or from elsewhere is refused and logged.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedlora.engines.flower.messages import ASK, HELLO, Answer, Hello, Presence, answers_of, lasting, request_plain
from fedlora.engines.flower.records import Header, frame_of, header_of, pack, size_of
from fedlora.errors import UserError
from fedlora.federation.admission import Limits, oversized
from fedlora.federation.algorithm import Reply, Request
from fedlora.federation.exchange import Asked
from fedlora.federation.spec import Client
from fedlora.federation.wire import decode, encode
from fedlora.sites.agreement import differences

log = logging.getLogger(__name__)
GRACE, LOOK = 5.0, 1.0
GONE = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED)
"""What Flower says in a site's place: the site itself may still come back."""
LIMITS = Limits()


@dataclass(frozen=True)
class Patience:
    """How long the server waits. ``deadline``: seconds for the answers of a round; ``quorum``: the share of the asked
    clients without which it waits on; ``join``: seconds for sites to come and load their base; ``sites``: how many
    must be there before the first round; ``poll``: seconds between looks."""

    deadline: float = 600.0
    quorum: float = 0.5
    join: float = 600.0
    sites: int = 1
    poll: float = 0.1


@dataclass(eq=False)
class Site:
    """A site that has introduced itself. ``node``: Flower's number of its SuperNode; ``silent``: it missed a deadline
    or went, and has not introduced itself since; ``held``: arrays that it keeps and need not travel again."""

    name: str
    node: int
    clients: tuple[str, ...]
    silent: bool = False
    held: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Question:
    """A question that waits for its answer."""

    header: Header
    node: int
    sent: float
    clients: tuple[str, ...] = ()
    lasting: frozenset[str] = frozenset()


@dataclass(eq=False)
class Traffic:
    """What a site did in a round: seconds of work, bytes of whole frames to it and from it, answers refused."""

    seconds: float = 0.0
    down: int = 0
    up: int = 0
    refused: int = 0


Say = Callable[[Mapping[str, Any]], None]
"""Told what happens, for whoever watches."""


@dataclass(eq=False)
class GridFleet:
    """A fleet over a Grid. ``hello`` is what every new node is told; ``write``: whether an evaluation's deployed models
    are kept as adapters at the sites, by client; ``nodes``: whose key each node has, where keys are registered;
    ``unsuited``: why the algorithm cannot serve some clients, or ""; ``again``: how a person goes on with the run."""

    grid: Grid
    hello: Hello
    patience: Patience = Patience()
    say: Say = lambda event: None
    limits: Limits = LIMITS
    nodes: Mapping[int, str] | None = None
    write: frozenset[str] = frozenset()
    unsuited: Callable[[Sequence[Client]], str] = lambda clients: ""
    again: str = "fedlora resume"
    sites: dict[str, Site] = field(default_factory=dict[str, Site])
    clients: dict[str, Client] = field(default_factory=dict[str, Client])
    strangers: set[str] = field(default_factory=set[str])
    asked: dict[str, Question] = field(default_factory=dict[str, Question])  # by Flower's message id
    refused: dict[int, str] = field(default_factory=dict[int, str])  # nodes that do not take part
    traffic: dict[str, Traffic] = field(default_factory=dict[str, Traffic])
    steps: int = 0
    flops: dict[str, float] = field(default_factory=dict[str, float])

    # -- who is there

    def available(self, round: int) -> Sequence[Client]:
        """The clients of all sites that are connected and not silent; waits until some are, at first for all that were
        planned (a server that was started again finds them all busy with introducing themselves)."""
        if not self.sites:
            self.gather(self.patience.sites, at_least=self.patience.sites if round <= 1 else 1)
        self.gather(1)
        here = set(self.grid.get_node_ids())
        names = [n for site in self.sites.values() if site.node in here and not site.silent for n in site.clients]
        return [self.clients[name] for name in sorted(names) if name not in self.strangers]

    def gather(self, count: int, at_least: int = 1) -> None:
        """Greets new nodes and hears from them until so many sites are there, or ``at_least`` so many when the time is
        over; UserError where fewer come."""
        end = time.monotonic() + self.patience.join
        while True:
            here = self._greet()
            self._hear({HELLO})
            ready = [site for site in self.sites.values() if site.node in here and not site.silent]
            if len(ready) >= count:
                return
            if time.monotonic() > end and len(ready) >= at_least:
                log.warning("%d of %d sites are there: going on with them", len(ready), count)
                return
            if time.monotonic() > end:
                reasons = "; ".join(f"node {node}: {why}" for node, why in sorted(self.refused.items()))
                raise UserError(
                    f"{len(ready)} of {count} sites are there after {self.patience.join:.0f} s"
                    + (f" ({reasons})" if reasons else ""),
                    f"start the missing sites and look into their logs, then go on with: {self.again}",
                )
            time.sleep(self.patience.poll)

    def _greet(self) -> set[int]:
        """Says hello to nodes that have not been greeted, and again to silent ones: the nodes that are there. Whoever
        went is silent, also where it comes back under its old number: its data may be others than those it stated."""
        here = set(self.grid.get_node_ids())
        for site in self.sites.values():
            site.silent |= site.node not in here
        self.refused = {node: reason for node, reason in self.refused.items() if node in here}
        now = time.monotonic()
        for id in [id for id, question in self.asked.items() if now > question.sent + question.header.seconds + GRACE]:
            del self.asked[id]  # nobody answers any more
        waiting = {question.node for question in self.asked.values() if question.header.kind == HELLO}
        known = {site.node for site in self.sites.values() if not site.silent}
        for node in sorted(here - waiting - known - set(self.refused)):
            self._push(node, HELLO, 0, self.hello.plain(), self.patience.join)
        return here

    def _greeted(self, node: int, presence: Presence) -> list[Site]:
        """A node has introduced itself: its site, or none if it does not take part."""
        taken = {name: site.name for site in self.sites.values() for name in site.clients if site.name != presence.site}
        reason = presence.refused or next(
            (f"client {c.id!r} is at site {taken[c.id]!r} already" for c in presence.clients if c.id in taken), ""
        )
        if self.nodes is not None and self.nodes.get(node) != presence.site:
            reason = f"its key is registered as {self.nodes.get(node)!r}"
        if not reason:
            reason = "; ".join(differences(self.hello.facts, presence.facts)) if self.hello.facts else ""
        reason = reason or self.unsuited(presence.clients)
        if reason:
            self._refuse(node, presence.site, reason)
            return []
        names = tuple(client.id for client in presence.clients)
        self.sites[presence.site] = Site(presence.site, node, names)
        self.clients.update({client.id: client for client in presence.clients})
        self.strangers |= presence.strangers
        log.info("site %r (node %d) is there with %d clients", presence.site, node, len(names))
        self.say({"event": "joined", "site": presence.site, "clients": len(names)})
        return [self.sites[presence.site]]

    def _refuse(self, node: int, site: str, reason: str) -> None:
        """A node takes no part: it is not greeted again while it is there, and whoever watches is told."""
        self.refused[node] = reason
        log.warning("site %r (node %d) does not take part: %s", site, node, reason)
        self.say({"event": "refused", "site": site, "reason": reason})

    def observed(self) -> dict[str, dict[str, float]]:
        """What every site did since this was last asked for."""
        seen, self.traffic = self.traffic, {}
        return {name: dict(vars(one)) for name, one in sorted(seen.items())}

    def _of(self, node: int) -> Traffic:
        """The account of a node's site; of one that has not introduced itself, nobody's."""
        name = next((site.name for site in self.sites.values() if site.node == node), None)
        return Traffic() if name is None else self.traffic.setdefault(name, Traffic())

    def flush(self) -> None:
        """Sites make memories durable before they answer."""

    # -- questions and answers

    def ask(self, requests: Asked) -> Iterator[tuple[str, Reply | None]]:
        """Sends every site its clients' requests and yields replies as they come, until all are there or the deadline
        has passed with the quorum reached. A site that comes back meanwhile is asked again."""
        start, waiting = time.monotonic(), dict.fromkeys(sorted(requests))
        total, answered, round, looked = len(waiting), 0, 0, start
        here = set(self.grid.get_node_ids())
        for site in list(self.sites.values()):
            names = [name for name in site.clients if name in waiting]
            site.silent |= site.node not in here
            if names and site.silent:
                log.warning("site %r is not there: its clients are left out", site.name)
                for name in names:
                    del waiting[name]
                    yield name, None
            elif names:
                built = dict(self._built(requests, names))
                for name in [name for name in names if name not in built]:
                    del waiting[name]
                    yield name, None
                if built:
                    round = self._send(site, built, self.patience.deadline)
        self.say({"event": "asked", "round": round, "clients": total})
        while waiting:
            passed = time.monotonic() - start
            if passed > self.patience.deadline:
                if answered >= self.patience.quorum * total:
                    break
                log.warning(
                    "round %d: %d of %d clients have answered, the quorum is %g: waiting on",
                    round,
                    answered,
                    total,
                    self.patience.quorum,
                )
                start = time.monotonic()
            if time.monotonic() > looked + LOOK:
                looked = time.monotonic()
                self._greet()
            back, found = self._hear({HELLO, ASK})
            for answer in found:
                if answer.client not in waiting:
                    continue
                del waiting[answer.client]
                answered += answer.reply is not None
                self._count(answer)
                said = {"client": answer.client, "problem": answer.problem, "seconds": answer.cost.seconds}
                self.say({"event": "answered", "round": round, **said})
                yield answer.client, answer.reply
            for site in back:  # after what it had still to say
                if names := [name for name in site.clients if name in waiting]:
                    log.info("site %r is back: asked again", site.name)
                    if built := dict(self._built(requests, names)):
                        self._send(site, built, max(self.patience.deadline - passed, 1))
            if not back and not found and waiting:
                time.sleep(self.patience.poll)
        self._leave_behind(round, set(waiting))

    @staticmethod
    def _built(requests: Asked, names: Sequence[str]) -> Iterator[tuple[str, Request]]:
        """The requests of a site's clients. Whom the algorithm cannot serve is left out: a site that states something
        else than at first must not cost the others their run."""
        for name in names:
            try:
                yield name, requests[name]
            except UserError as problem:
                log.warning("client %r is left out: %s", name, problem)

    def _send(self, site: Site, requests: Mapping[str, Request], seconds: float) -> int:
        held, body = site.held, list[Any]()
        for name, request in requests.items():
            body.append(request_plain(name, request, name in self.write, held))
            held |= lasting(request.payload)  # the site's next client finds it there
        round = next(iter(requests.values())).round
        self._push(site.node, ASK, round, body, seconds, tuple(requests), held)
        return round

    def _push(
        self,
        node: int,
        kind: str,
        round: int,
        body: Any,
        seconds: float,
        clients: tuple[str, ...] = (),
        kept: frozenset[str] = frozenset(),
    ) -> None:
        header = Header(secrets.token_hex(16), kind, self.hello.run_id, round, float(seconds))
        frame = encode(body)
        self._of(node).down += len(frame)
        message = Message(pack(header, frame), node, "query", ttl=seconds + GRACE)
        for id in self.grid.push_messages([message]):
            if id:
                self.asked[id] = Question(header, node, time.monotonic(), clients, kept)

    def _hear(self, kinds: set[str]) -> tuple[list[Site], list[Answer]]:
        """What has come: the sites that introduced themselves, and answers."""
        ids = [id for id, question in self.asked.items() if question.header.kind in kinds]
        back: list[Site] = []
        found: list[Answer] = []
        for message in self.grid.pull_messages(ids) if ids else ():
            question = self.asked.pop(message.metadata.reply_to_message_id, None)
            if question is None:
                log.warning("an answer from node %d to no open question is refused", message.metadata.src_node_id)
                continue
            if message.has_error() and message.error.code in GONE:
                log.warning("node %d is gone: %s", question.node, message.error.reason)
                self._silence(question.node)
                continue
            try:
                body = self._read(message, question)
                if question.header.kind == HELLO:
                    back += self._greeted(question.node, Presence.from_plain(body))
                else:
                    own = [answer for answer in answers_of(body) if answer.client in question.clients]
                    self._of(question.node).seconds += sum(answer.cost.seconds for answer in own)
                    found += own
                    self._holds(question.node, question.lasting)
            except ValueError as problem:
                log.warning("the answer of node %d is refused: %s", question.node, problem)
                self._of(question.node).refused += 1
                found += [Answer(name, None, str(problem)) for name in question.clients]
                self._holds(question.node, frozenset())
                if question.header.kind == HELLO:
                    name = (self.nodes or {}).get(question.node, f"node {question.node}")
                    self._refuse(question.node, name, str(problem))
        return back, found

    def _silence(self, node: int) -> None:
        """Its site is asked again when it has answered a greeting."""
        for site in self.sites.values():
            if site.node == node:
                site.silent = True

    def _holds(self, node: int, names: frozenset[str]) -> None:
        """What a site has acknowledged; after a failure everything is sent again."""
        for site in self.sites.values():
            if site.node == node:
                site.held = names

    def _read(self, message: Message, question: Question) -> Any:
        """The body of an answer; ValueError where it does not belong to the question."""
        if message.has_error():
            raise ValueError(f"the site failed: {message.error.reason}")
        if message.metadata.src_node_id != question.node:
            raise ValueError("another node was asked")
        header = header_of(message.content)
        if (header.nonce, header.round) != (question.header.nonce, question.header.round):
            raise ValueError("it answers another question")
        if refusal := oversized(size_of(message.content), self.limits):
            raise ValueError(str(refusal))
        frame = frame_of(message.content)
        self._of(question.node).up += len(frame)
        return decode(frame)

    def _count(self, answer: Answer) -> None:
        """Keeps account of what the sites' work took."""
        self.steps += answer.cost.steps
        self.flops[answer.client] = self.flops.get(answer.client, 0.0) + answer.cost.flops
        if answer.problem:
            log.warning("client %r is lost: %s", answer.client, answer.problem)

    def _leave_behind(self, round: int, missing: set[str]) -> None:
        """The questions of a round are closed; who did not answer is asked again when it is heard of."""
        for id in [id for id, question in self.asked.items() if question.header.kind == ASK]:
            question = self.asked.pop(id)
            for site in self.sites.values():
                if site.node == question.node and missing & set(site.clients):
                    site.silent = True
                    log.warning("round %d: site %r is left behind at the deadline", round, site.name)
                    self.say({"event": "silent", "site": site.name, "round": round})
