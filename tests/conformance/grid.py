"""Flower's Grid inside one process: messages go through Flower's serialisation to functions that stand for nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from conformance.toy import Fleet
from fedlora.engines.flower.fleet import GridFleet, Patience
from fedlora.engines.flower.messages import Hello, Presence
from fedlora.engines.flower.ready import Ready
from fedlora.engines.flower.records import frame_of, header_of, pack
from fedlora.engines.flower.resident import Resident
from fedlora.engines.simulator import Simulator
from fedlora.federation.algorithm import Reply, Request
from fedlora.federation.wire import decode, encode
from fedlora.study.config import parse
from fedlora.study.experiment import Terms

CONFIG = parse(
    {
        "model": {"name": "minilm", "task": "text-classification"},
        "data": {"train": "nothing", "text": "text", "label": "label"},
        "algorithm": {"name": "fedit"},
    },
    "test",
)
HELLO = Hello("run", CONFIG, Terms(("red",), ("text", "label"), {"fc1": 4}, 1, {}, {}))
Node = Callable[[Message], Message | None]
"""Answers a message; None: never."""


@dataclass
class LocalGrid(Grid):
    """``nodes`` by number; ``alter``: what the network makes of the replies on their way."""

    nodes: dict[int, Node]
    alter: Callable[[list[Message]], list[Message]] = lambda messages: messages
    here: set[int] = field(default_factory=set)
    replies: dict[str, Message] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.here = set(self.nodes)
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # as in a ServerApp's process

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.here)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.count += 1
            message.metadata.__dict__["_message_id"] = f"message-{self.count}"
            ids.append(message.metadata.message_id)
            arrived = travelled(message)
            if message.metadata.dst_node_id in self.here:
                reply = self.nodes[message.metadata.dst_node_id](arrived)
                if reply is not None:
                    self.replies[message.metadata.message_id] = travelled(reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.alter([self.replies.pop(id) for id in message_ids if id in self.replies])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def travelled(message: Message) -> Message:
    """The message as it comes out of Flower's objects at the other end."""
    contents = {id: part.deflate() for id, part in get_all_nested_objects(message).items()}
    arrived = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(arrived, Message)
    arrived.metadata.__dict__["_message_id"] = message.metadata.message_id
    return arrived


def node(resident: Resident) -> Node:
    """A SuperNode with its ClientApp and worker."""

    def answer(message: Message) -> Message:
        header = header_of(message.content)
        try:
            body = resident.answer(header.kind, header.run, decode(frame_of(message.content)), lambda: None)
        except LookupError as problem:  # the worker says that it failed
            return Message(Error(1, str(problem)), reply_to=message)
        return Message(pack(header, encode(body)), reply_to=message)

    return answer


def site(name: str, simulator: Simulator, learner: Any, folder: Path) -> Resident:
    """A resident site over some clients of the toy world."""

    def prepare(place: Path, hello: Hello) -> Ready:
        presence = Presence(name, tuple(client for _, client in sorted(simulator.clients.items())))
        return Ready(presence, simulator, learner, lambda: (0, {}), lambda names: lambda *told: None)

    return Resident(folder, prepare)


def divided(fleet: Fleet, folder: Path, count: int = 3) -> LocalGrid:
    """The toy world's clients at so many sites; memories and learner are the fleet's."""
    names = sorted(fleet.clients)
    nodes = {}
    for number in range(min(count, len(names))):
        own = {name: fleet.clients[name] for name in names[number::count]}
        place = folder / f"site-{number}"
        place.mkdir(parents=True, exist_ok=True)
        nodes[100 + number] = node(site(place.name, replace(fleet.inner, clients=own), fleet.learner, place))
    return LocalGrid(nodes)


@dataclass
class Flower(Fleet):
    """The toy fleet, but every question goes through the Grid to sites and back."""

    folder: Path = Path()

    def ask(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply | None]]:
        fate = {name: self.lost(requests[name].kind, requests[name].round, name) for name in sorted(requests)}
        for name in [name for name, when in fate.items() if when == "before"]:
            yield name, None
        asked = {name: requests[name] for name, when in fate.items() if when != "before"}
        grid = divided(self, self.folder)
        if self.backwards:
            grid.alter = lambda messages: messages[::-1]
        patience = Patience(deadline=30, join=5, sites=len(grid.nodes), poll=0.0)
        remote = GridFleet(grid, HELLO, patience)
        assert {client.id for client in remote.available(1)} == set(self.clients)
        for name, reply in remote.ask(asked):
            yield name, None if fate[name] == "after" else reply
