"""Who is asked, who is waited for, and which answers do not count."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from conformance.grid import HELLO, divided, node, site
from conformance.table import world
from conformance.toy import Fleet
from fedlora.engines.flower.fleet import GridFleet, Patience
from fedlora.engines.flower.messages import Answer, Hello, Presence, Unreadable, answers_of
from fedlora.engines.flower.records import Header, Malformed, frame_of, header_of, pack
from fedlora.errors import UserError
from fedlora.federation.admission import Limits
from fedlora.federation.algorithm import Reply, Request
from fedlora.federation.rounds import rounds
from fedlora.federation.wire import decode, encode, same

QUICK = Patience(deadline=0.3, quorum=0.5, join=2.0, sites=3, poll=0.01)


@pytest.fixture
def toys() -> Fleet:
    return world("fedit", count=5)


def federation(toys: Fleet, folder: Path, patience: Patience = QUICK, **options: Any) -> GridFleet:
    return GridFleet(divided(toys, folder), HELLO, patience, **options)


def requests(toys: Fleet, round: int = 1) -> dict[str, Request]:
    state = toys.algorithm.server_init(toys.spec, 0)
    return {
        name: Request("run", "train", round, 5, None, None, toys.algorithm.broadcast(state, client, round))
        for name, client in toys.clients.items()
    }


def replies(fleet: GridFleet, asked: Mapping[str, Request]) -> dict[str, bool]:
    """Whether each client that was heard has a reply."""
    return {name: reply is not None for name, reply in fleet.ask(asked)}


def test_every_client_once(toys: Fleet, tmp_path: Path) -> None:
    fleet = federation(toys, tmp_path)
    assert [client.id for client in fleet.available(1)] == sorted(toys.clients)
    assert replies(fleet, requests(toys)) == dict.fromkeys(toys.clients, True)
    assert not fleet.asked


def test_too_few_sites_is_an_error(toys: Fleet, tmp_path: Path) -> None:
    fleet = federation(toys, tmp_path, replace(QUICK, sites=4, join=0.1))
    with pytest.raises(UserError, match="3 of 4 sites"):
        fleet.available(1)


def test_a_server_started_again_waits_for_all_sites(toys: Fleet, tmp_path: Path) -> None:
    fleet = federation(toys, tmp_path, replace(QUICK, join=10.0))
    grid: Any = fleet.grid
    looks = 0

    def nodes() -> list[int]:
        nonlocal looks
        looks += 1
        return [100, 101, 102] if looks > 5 else [100, 101]

    grid.get_node_ids = nodes
    assert [client.id for client in fleet.available(4)] == sorted(toys.clients)
    fleet = federation(toys, tmp_path, replace(QUICK, sites=4, join=0.1))  # one of them never comes
    assert [client.id for client in fleet.available(4)] == sorted(toys.clients)


def hung(fleet: GridFleet, number: int = 100) -> Callable[[], None]:
    """A node stops answering; call the result to revive it."""
    grid: Any = fleet.grid
    alive = grid.nodes[number]
    grid.nodes[number] = lambda message: None
    return lambda: grid.nodes.__setitem__(number, alive)


def test_a_silent_site_is_left_behind_and_returns(toys: Fleet, tmp_path: Path) -> None:
    said: list[Mapping[str, Any]] = []
    fleet = federation(toys, tmp_path, say=said.append)
    fleet.available(1)
    revive = hung(fleet)
    assert replies(fleet, requests(toys)) == dict.fromkeys(["c1", "c2", "c4"], True)
    assert [(e["event"], e["site"]) for e in said if e["event"] == "silent"] == [("silent", "site-0")]
    assert [client.id for client in fleet.available(2)] == ["c1", "c2", "c4"]  # not waited for again
    revive()
    fleet.asked.clear()  # its greeting is lost; the next one is answered
    fleet.available(3)
    assert [client.id for client in fleet.available(3)] == sorted(toys.clients)


def test_below_the_quorum_the_server_waits_on(toys: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fleet = federation(toys, tmp_path, replace(QUICK, quorum=1.0))
    fleet.available(1)
    hung(fleet)
    grid: Any = fleet.grid
    back = divided(toys, tmp_path).nodes[100]
    count = 0

    def nodes() -> list[int]:
        nonlocal count
        count += 1
        if count == 2:  # the site comes back under another number, as after a restart
            grid.nodes[200] = back
            grid.here = {101, 102, 200}
        return sorted(grid.here)

    grid.get_node_ids = nodes
    with caplog.at_level(logging.INFO, "fedlora"):
        assert replies(fleet, requests(toys)) == dict.fromkeys(toys.clients, True)
    assert "waiting on" in caplog.text
    assert "site 'site-0' is back" in caplog.text


def altered(fleet: GridFleet, change: Callable[[Message], list[Message]]) -> None:
    """The network changes what node 100 sends after it has introduced itself."""

    def alter(messages: list[Message]) -> list[Message]:
        return [new for m in messages for new in (change(m) if m.metadata.src_node_id == 100 else [m])]

    grid: Any = fleet.grid
    grid.alter = alter


def forged(message: Message, **changes: Any) -> Message:
    """The reply with another header."""
    frame = frame_of(message.content)
    header = replace(header_of(message.content), **changes)
    message.content = pack(header, frame)
    return message


def test_duplicates_and_replays_count_once(toys: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fleet = federation(toys, tmp_path)
    fleet.available(1)
    kept: list[Message] = []

    def twice(message: Message) -> list[Message]:
        kept.append(message)
        return [message, message, *kept[:1]]

    altered(fleet, twice)
    with caplog.at_level(logging.WARNING, "fedlora"):
        first = [name for name, _ in fleet.ask(requests(toys, 1))]
        second = [name for name, _ in fleet.ask(requests(toys, 2))]
    assert sorted(first) == sorted(second) == sorted(toys.clients)
    assert "to no open question is refused" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nonce": "0" * 32}, "another question"),
        ({"round": 7}, "another question"),
        ({"nonce": 5}, "its nonce is 5"),
    ],
)
def test_answers_to_other_questions_are_refused(
    toys: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], reason: str
) -> None:
    fleet = federation(toys, tmp_path)
    fleet.available(1)
    altered(fleet, lambda message: [forged(message, **changes)])
    with caplog.at_level(logging.WARNING, "fedlora"):
        found = replies(fleet, requests(toys))
    assert {name for name, there in found.items() if not there} == {"c0", "c3"}
    assert reason in caplog.text


def wrong(message: Message, body: Any) -> Message:
    """The reply with another body."""
    message.content = pack(header_of(message.content), encode(body))
    return message


def test_what_is_too_large_or_unreadable_is_refused(
    toys: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = federation(toys, tmp_path, limits=Limits(message=4000))
    fleet.available(1)

    def large(message: Message) -> list[Message]:
        message.content = pack(header_of(message.content), bytes(5000))
        return [message]

    altered(fleet, large)
    with caplog.at_level(logging.WARNING, "fedlora"):
        found = replies(fleet, requests(toys))
    assert not found["c0"]
    assert "5,000 bytes" in caplog.text
    fleet = federation(toys, tmp_path / "again")
    fleet.available(1)
    altered(fleet, large)  # within the limits, but no frame
    with caplog.at_level(logging.WARNING, "fedlora"):
        assert not replies(fleet, requests(toys))["c0"]
    assert "not a frame" in caplog.text
    altered(fleet, lambda message: [wrong(message, [{"client": 3}])])
    with caplog.at_level(logging.WARNING, "fedlora"):
        assert not replies(fleet, requests(toys, 2))["c0"]
    assert "cost is no table" in caplog.text


def test_a_site_that_fails_is_lost_with_its_reason(toys: Fleet, tmp_path: Path) -> None:
    said: list[Mapping[str, Any]] = []
    fleet = federation(toys, tmp_path, say=said.append)
    fleet.available(1)
    grid: Any = fleet.grid
    grid.nodes[101] = lambda message: Message(Error(1, "no worker"), reply_to=message)
    found = replies(fleet, requests(toys))
    assert found == {"c0": True, "c1": False, "c2": True, "c3": True, "c4": False}
    assert {e["problem"] for e in said if e["event"] == "answered"} == {"", "the site failed: no worker"}


def test_a_site_that_flower_calls_gone_is_waited_for(toys: Fleet, tmp_path: Path) -> None:
    """Flower answers in the place of a node without heartbeats; the site comes back under another number."""
    fleet = federation(toys, tmp_path, replace(QUICK, deadline=30.0))
    fleet.available(1)
    grid: Any = fleet.grid
    working, gone = grid.nodes[100], 0

    def dead(message: Message) -> Message:
        nonlocal gone
        gone += 1
        grid.here = {101, 102, 200}
        grid.nodes[200] = working
        return Message(Error(ErrorCode.NODE_UNAVAILABLE, "no heartbeat"), reply_to=message)

    grid.nodes[100] = dead
    assert replies(fleet, requests(toys)) == dict.fromkeys(toys.clients, True)
    assert gone == 1


def test_clients_of_absent_sites_are_not_waited_for(toys: Fleet, tmp_path: Path) -> None:
    """An evaluation asks for everybody, also for those whose site has left for good."""
    fleet = federation(toys, tmp_path, replace(QUICK, deadline=30.0))
    fleet.available(1)
    grid: Any = fleet.grid
    grid.here = {101, 102}
    assert replies(fleet, requests(toys)) == {"c0": False, "c1": True, "c2": True, "c3": False, "c4": True}


def test_no_site_answers_for_anothers_clients(toys: Fleet, tmp_path: Path) -> None:
    fleet = federation(toys, tmp_path)
    fleet.available(1)

    def boastful(message: Message) -> list[Message]:
        body = decode(frame_of(message.content))
        stolen = [{**one, "client": "c1"} for one in body]
        message.content = pack(header_of(message.content), encode(body + stolen))
        return [message]

    altered(fleet, boastful)
    heard: list[str] = [name for name, _ in fleet.ask(requests(toys))]
    assert sorted(heard) == sorted(toys.clients)


def test_two_sites_cannot_have_one_client(toys: Fleet, tmp_path: Path) -> None:
    fleet = federation(toys, tmp_path, replace(QUICK, sites=1))
    grid: Any = fleet.grid
    grid.nodes[300] = node(site("impostor", toys.inner, toys.learner, tmp_path / "site-0"))
    grid.here.add(300)
    fleet.available(1)
    assert "is at site" in fleet.refused[300]
    assert "impostor" not in fleet.sites


def test_registered_keys_bind_names(toys: Fleet, tmp_path: Path) -> None:
    fleet = federation(toys, tmp_path, replace(QUICK, sites=2), nodes={100: "site-0", 101: "site-2", 102: "site-2"})
    fleet.available(1)
    assert set(fleet.sites) == {"site-0", "site-2"}
    assert fleet.refused == {101: "its key is registered as 'site-2'"}


def test_facts_that_differ_are_named(toys: Fleet, tmp_path: Path) -> None:
    hello = Hello("run", HELLO.config, HELLO.terms, {"base": "sha256:1"})
    fleet = GridFleet(divided(toys, tmp_path), hello, replace(QUICK, join=0.1))
    with pytest.raises(UserError, match="base: the server has sha256:1"):
        fleet.available(1)


def test_a_run_goes_on_without_a_hung_site(toys: Fleet, tmp_path: Path) -> None:
    fleet = federation(toys, tmp_path)
    reports = []
    for report in rounds(toys.algorithm, toys.spec, fleet, total=3, seed=0):
        reports.append(report)
        if report.round == 1:
            hung(fleet, 102)
    assert reports[1].folded == ("c0", "c1", "c2", "c3", "c4")
    assert reports[2].lost == ("c2",)
    assert reports[3].folded == ("c0", "c1", "c3", "c4")
    assert reports[3].lost == ()


# ---------------------------------------------------------------- messages


def test_records_carry_frames_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.engines.flower.records.CHUNK", 1000)
    header = Header("abc", "ask", "run", 3, 1.5)
    frame = encode({"x": torch.arange(700.0)})
    content = pack(header, frame)
    assert len(content.array_records["frame"]) == -(-len(frame) // 1000)
    assert header_of(content) == header
    assert frame_of(content) == frame
    del content.array_records["frame"]["000001"]
    with pytest.raises(Malformed, match="order"):
        frame_of(content)


GOOD = Answer("c", Reply("run", "train", 1, None, None)).plain()


@pytest.mark.parametrize(
    "value",
    [
        None,
        [{}],
        [{**GOOD, "client": 3}],
        [{**GOOD, "cost": {"seconds": "long"}}],
        [{**GOOD, "reply": {**GOOD["reply"], "kind": "attack"}}],
        [{**GOOD, "reply": {**GOOD["reply"], "round": "1"}}],
        [{**GOOD, "reply": {**GOOD["reply"], "update": {"arrays": {"x": 1}, "weight": 1.0, "sums": {}}}}],
        [{**GOOD, "reply": {**GOOD["reply"], "update": {"arrays": {}, "weight": 1.0, "sums": {"loss": [1.0]}}}}],
        [{**GOOD, "reply": {**GOOD["reply"], "sums": {"deployed": 4}}}],
    ],
)
def test_answers_are_checked_before_they_are_believed(value: Any) -> None:
    assert answers_of([GOOD])[0].client == "c"
    with pytest.raises(Unreadable):
        answers_of(value)


@pytest.mark.parametrize("value", [None, {}, {"site": "a"}, {**Presence("a").plain(), "clients": [{"id": "x"}]}])
def test_presences_are_checked(value: Any) -> None:
    with pytest.raises(Unreadable):
        Presence.from_plain(value)


def test_hello_travels() -> None:
    arrived = Hello.from_plain(decode(encode(HELLO.plain())))
    assert arrived.config == HELLO.config
    assert (arrived.terms.labels, arrived.terms.most) == (("red",), {"fc1": 4})


# ---------------------------------------------------------------- what does not travel twice


def trained(fleet: Any, toys: Fleet, total: int = 4) -> list[Any]:
    return list(rounds(toys.algorithm, toys.spec, fleet, total=total, seed=0))


def test_what_lasts_travels_once(tmp_path: Path) -> None:
    """FLoRA changes the base every round: a site keeps the changes, and the numbers are the simulator's."""
    toys, alone = world("flora", count=3), world("flora", count=3)
    fleet = federation(toys, tmp_path, replace(QUICK, deadline=30.0))
    sizes: list[int] = []
    push, grid = fleet.grid.push_messages, fleet.grid

    def counted(messages: Any) -> Any:
        sizes.extend(len(frame_of(m.content)) for m in messages if header_of(m.content).kind == "ask")
        return push(messages)

    grid.push_messages = counted  # type: ignore[method-assign]
    there, here = trained(fleet, toys), trained(alone, alone)
    assert same(there[-1].checkpoint, here[-1].checkpoint)
    counts = [report.bytes["down"] for report in there[1:]]
    assert counts == [report.bytes["down"] for report in here[1:]]
    wire = [sum(sizes[i : i + 3]) for i in range(0, 12, 3)]
    overhead = wire[0] - counts[0]  # names and numbers of three requests
    assert all(abs(seen - count - overhead) < 1000 for seen, count in zip(wire, counts))


def test_a_site_that_lost_what_it_kept_is_sent_all_of_it(tmp_path: Path) -> None:
    toys = world("flora", count=3)
    fleet = federation(toys, tmp_path, replace(QUICK, deadline=30.0))
    lost = []
    for report in rounds(toys.algorithm, toys.spec, fleet, total=4, seed=0):
        lost.append(report.lost)
        if report.round == 2:
            shutil.rmtree(tmp_path / "site-1" / "held")
    assert lost == [(), (), (), ("c1",), ()]
