"""What server and sites say to each other, as plain values; what arrives is checked before it is believed.

``hello`` (what a run is) -> who serves which clients, or why not; ``ask`` (requests of clients) -> their replies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from fedlora.federation.algorithm import Reply, Request, Update
from fedlora.federation.orders import Model
from fedlora.federation.spec import Client, Sums, Tree
from fedlora.study.config import RunConfig, parse
from fedlora.study.experiment import Terms

HELLO, ASK = "hello", "ask"
KINDS = ("introduce", "train", "evaluate")


class Unreadable(ValueError):
    """A message that does not say what it should."""


# -- hello


@dataclass(frozen=True)
class Hello:
    """What the server says of a run: its id, its resolved run file, the terms of everybody, and its facts (texts and
    digests by name) that a site compares with its own."""

    run_id: str
    config: RunConfig
    terms: Terms
    facts: Mapping[str, str] = field(default_factory=dict[str, str])

    def plain(self) -> dict[str, Any]:
        """As it travels: without what each site knows of its own clients."""
        terms = {name: getattr(self.terms, name) for name in ("labels", "fields", "most", "least")}
        config = self.config.model_dump(mode="json", by_alias=True)
        return {"run_id": self.run_id, "config": config, "terms": terms, "facts": dict(self.facts)}

    @classmethod
    def from_plain(cls, value: Any) -> Hello:
        """The inverse; UserError where this version does not know a key of the run file."""
        found = _table(value, "hello")
        terms = _table(found.get("terms"), "terms")
        return cls(
            _text(found.get("run_id"), "run_id"),
            parse(_table(found.get("config"), "config"), "the server's run file"),
            Terms(tuple(terms["labels"]), tuple(terms["fields"]), terms["most"], terms["least"], {}, {}),
            {k: _text(v, k) for k, v in _table(found.get("facts"), "facts").items()},
        )


@dataclass(frozen=True)
class Presence:
    """A site's answer: its name, its clients, which of them never train, and its facts; or why it takes no part."""

    site: str
    clients: tuple[Client, ...] = ()
    strangers: frozenset[str] = frozenset()
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    refused: str = ""

    def plain(self) -> dict[str, Any]:
        """As it travels."""
        clients = [{**vars(client), "ranks": dict(client.ranks)} for client in self.clients]
        return {**vars(self), "clients": clients, "strangers": sorted(self.strangers), "facts": dict(self.facts)}

    @classmethod
    def from_plain(cls, value: Any) -> Presence:
        """The inverse."""
        found = _table(value, "presence")
        clients: list[Client] = []
        for one in _list(found.get("clients"), "clients"):
            about = _table(one, "client")
            ranks = {k: _whole(v, f"rank of {k}") for k, v in _table(about.get("ranks"), "ranks").items()}
            examples = about.get("examples")
            count = None if examples is None else _whole(examples, "examples")
            clients.append(Client(_text(about.get("id"), "id"), ranks, _text(about.get("backbone"), "backbone"), count))
        return cls(
            _text(found.get("site"), "site"),
            tuple(clients),
            frozenset(_text(name, "stranger") for name in _list(found.get("strangers"), "strangers")),
            {k: _text(v, k) for k, v in _table(found.get("facts"), "facts").items()},
            _text(found.get("refused"), "refused"),
        )


# -- ask


def lasting(payload: Mapping[str, Any]) -> frozenset[str]:
    """The names of what never changes again, "ROUND:NAME" (see ``exchange.unheld``): a site keeps it.

    >>> lasting({"q/A": 0, "000001:q/A": 1})
    frozenset({'000001:q/A'})
    """
    return frozenset(name for name in payload if name.partition(":")[0].isdigit())


def request_plain(client: str, request: Request, write: bool = False, held: Collection[str] = ()) -> dict[str, Any]:
    """One client's request. ``write``: the site keeps the deployed model that it scores as an adapter's folder;
    ``held``: names of the payload that the site holds already."""
    judge = None if request.judge is None else request.judge.plain()
    payload = {name: None if name in held else value for name, value in request.payload.items()}
    fields = {**vars(request), "judge": judge, "splits": list(request.splits), "payload": payload}
    return {**fields, "client": client, "write": write}


def request_of(value: Any, kept: Callable[[str, Tensor | None], Tensor]) -> tuple[str, Request, bool]:
    """(client, request, write). ``kept``: keeps what lasts, and gives back what does not travel twice (None)."""
    found = dict(_table(value, "request"))
    client, write = _text(found.pop("client", None), "client"), bool(found.pop("write", False))
    found["payload"] = {
        name: kept(name, array) if lasting({name: array}) else array
        for name, array in _table(found.get("payload"), "payload").items()
    }
    if set(found) != set(Request.__dataclass_fields__) or found["kind"] not in KINDS:
        raise Unreadable(f"a request of kind {found.get('kind')!r} with {sorted(found)}")
    judge = None if found["judge"] is None else Model.from_plain(found["judge"])
    return client, Request(**{**found, "judge": judge, "splits": tuple(found["splits"])}), write


@dataclass(frozen=True)
class Cost:
    """What answering took a site."""

    seconds: float = 0.0
    steps: int = 0
    flops: float = 0.0


@dataclass(frozen=True, eq=False)
class Answer:
    """One client's reply, or why there is none."""

    client: str
    reply: Reply | None
    problem: str = ""
    cost: Cost = Cost()

    def plain(self) -> dict[str, Any]:
        """As it travels."""
        reply = self.reply and {**vars(self.reply), "update": self.reply.update and vars(self.reply.update)}
        return {"client": self.client, "reply": reply, "problem": self.problem, "cost": vars(self.cost)}

    @classmethod
    def from_plain(cls, value: Any) -> Answer:
        """The inverse; Unreadable where anything is not as an honest site writes it."""
        found = _table(value, "answer")
        cost = _table(found.get("cost"), "cost")
        spent = Cost(_number(cost.get("seconds")), _whole(cost.get("steps"), "steps"), _number(cost.get("flops")))
        reply = None if found.get("reply") is None else _reply(_table(found.get("reply"), "reply"))
        return cls(_text(found.get("client"), "client"), reply, _text(found.get("problem"), "problem"), spent)


def answers_of(value: Any) -> list[Answer]:
    """The answers of one site."""
    return [Answer.from_plain(one) for one in _list(value, "answers")]


def _reply(found: Mapping[str, Any]) -> Reply:
    kind = _text(found.get("kind"), "kind")
    if kind not in KINDS:
        raise Unreadable(f"a reply of kind {kind!r}")
    update, sums = None, found.get("sums")
    if found.get("update") is not None:
        about = _table(found.get("update"), "update")
        update = Update(_tree(about.get("arrays")), _number(about.get("weight")), _sums(about.get("sums")))
    scores = None if sums is None else {name: _sums(one) for name, one in _table(sums, "sums").items()}
    return Reply(
        _text(found.get("run_id"), "run_id"),
        kind,  # type: ignore[arg-type]
        _whole(found.get("round"), "round"),
        update,
        scores,
    )


def _tree(value: Any) -> Tree:
    tree = _table(value, "arrays")
    if wrong := [name for name, array in tree.items() if not isinstance(array, Tensor)]:
        raise Unreadable(f"{wrong[0]} is no array")
    return cast(Tree, tree)


def _sums(value: Any) -> Sums:
    found: dict[str, tuple[float, float]] = {}
    for name, pair in _table(value, "sums").items():
        if len(_list(pair, name)) != 2:
            raise Unreadable(f"the sums of {name} are no pair")
        found[name] = (_number(pair[0]), _number(pair[1]))
    return found


def _table(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Unreadable(f"{name} is no table")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unreadable(f"{name} is no list")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unreadable(f"{name} is no text")
    return value


def _whole(value: Any, name: str) -> int:
    if type(value) is not int:
        raise Unreadable(f"{name} is no whole number")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise Unreadable("a number is missing")
    return float(value) if math.isfinite(value) else math.nan
