"""A site's answers: whom it works for, what it says when something fails, and what survives its worker."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.grid import HELLO, site
from conformance.table import world
from conformance.toy import Fleet
from fedlora.engines.flower import client_app, worker
from fedlora.engines.flower.channel import SECRET, Refused, connect, listen, prepare
from fedlora.engines.flower.messages import ASK, Presence, answers_of, request_plain
from fedlora.engines.flower.messages import HELLO as GREETING
from fedlora.engines.flower.ready import Ready
from fedlora.engines.flower.records import Header
from fedlora.engines.flower.resident import Resident
from fedlora.federation.algorithm import Request
from fedlora.federation.wire import decode, encode, same
from fedlora.sites.settings import Allowed


@pytest.fixture
def toys() -> Fleet:
    return world("fedit", count=3)


@pytest.fixture
def resident(toys: Fleet, tmp_path: Path) -> Resident:
    """One that has been told of the run."""
    place = tmp_path / "north"
    place.mkdir()
    found = site("north", toys.inner, toys.learner, place)
    found.answer(GREETING, "run", HELLO.plain(), lambda: None)
    toys.learner.forget = lambda: toys.learner.waiting.clear()  # type: ignore[attr-defined]
    return found


def body(toys: Fleet, *names: str, round: int = 1, base: int | None = None) -> list[dict[str, Any]]:
    state = toys.algorithm.server_init(toys.spec, 0)
    return [
        request_plain(
            name,
            Request("run", "train", round, 5, base, None, toys.algorithm.broadcast(state, toys.clients[name], round)),
        )
        for name in names
    ]


def test_it_answers_for_its_clients(resident: Resident, toys: Fleet) -> None:
    found = resident.ask("run", body(toys, "c2", "c0"), lambda: None)
    assert [(answer.client, answer.problem) for answer in found] == [("c2", ""), ("c0", "")]
    assert all(answer.reply is not None and answer.cost.seconds > 0 for answer in found)
    travelled = answers_of(decode(encode([answer.plain() for answer in found])))
    for a, b in zip(found, travelled, strict=True):
        assert a.reply is not None
        assert b.reply is not None
        assert a.reply.update is not None
        assert b.reply.update is not None
        assert same(a.reply.update.arrays, b.reply.update.arrays)
        assert (a.reply.update.weight, a.reply.update.sums) == (b.reply.update.weight, b.reply.update.sums)


def test_an_update_that_the_server_did_not_take_is_named(
    resident: Resident, toys: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    resident.ask("run", body(toys, "c0", "c1"), lambda: None)
    resident.ask("run", body(toys, "c0"), lambda: None)  # its answer was lost on the way: the same question again
    resident.ask("run", body(toys, "c0", round=2, base=1), lambda: None)
    assert "did not take" not in caplog.text
    resident.ask("run", [*body(toys, "c0", round=3, base=2), *body(toys, "c1", round=3)], lambda: None)
    assert caplog.text.count("did not take") == 1
    assert "client 'c1': the server did not take its update of round 1" in caplog.text
    caplog.clear()
    (judged,) = body(toys, "c1", round=3, base=1)
    resident.ask("run", [{**judged, "kind": "evaluate"}], lambda: None)  # which follows training in its round
    assert "its update of round 3" in caplog.text
    caplog.clear()
    resident.ask("run", [{**judged, "kind": "evaluate"}], lambda: None)
    assert "did not take" not in caplog.text  # once is enough


def test_a_server_that_was_started_again_has_refused_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toys = world("ce-lora", count=2)
    late = site("north", toys.inner, toys.learner, tmp_path)
    late.answer(GREETING, "run", HELLO.plain(), lambda: None)

    def ask(kind: str, round: int, base: int | None) -> None:
        (one,) = body(toys, "c0", round=round, base=base)
        payload = {} if kind == "introduce" else one["payload"]
        (answer,) = late.ask("run", [{**one, "kind": kind, "payload": payload}], lambda: None)
        assert answer.reply is not None

    for _ in range(2):  # killed before its checkpoint of round 3, it introduces the newcomer again
        ask("introduce", 2, None)
        ask("train", 3, 2)
    assert "did not take" not in caplog.text
    ask("introduce", 4, None)  # and now it has heard of neither
    assert "its update of round 3" in caplog.text


def test_clients_of_others_and_unknown_runs_are_refused(resident: Resident, toys: Fleet) -> None:
    (stranger,) = (
        a
        for a in resident.ask("run", [*body(toys, "c0"), {**body(toys, "c1")[0], "client": "x"}], lambda: None)
        if a.client == "x"
    )
    assert (stranger.reply, stranger.problem) == (None, "it is not at this site")
    (answer,) = resident.ask("other", body(toys, "c0"), lambda: None)
    assert "'other' has not been introduced" in answer.problem


def test_nobody_works_for_who_hung_up(resident: Resident, toys: Fleet) -> None:
    units = iter(range(100))
    stop = lambda: "who asked has hung up" if next(units) >= 1 else None  # noqa: E731
    found = resident.ask("run", body(toys, "c0", "c1", "c2"), stop)
    assert [bool(answer.reply) for answer in found] == [True, False, False]
    assert "hung up" in found[1].problem
    assert toys.learner.idle
    again = resident.ask("run", body(toys, "c1"), lambda: None)  # and the next question finds everything in order
    assert again[0].reply is not None


def test_what_fails_inside_is_not_told_outside(
    resident: Resident, toys: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(order: Any, job: Any) -> Any:
        raise RuntimeError("row 7: 'the patient has a name'")

    monkeypatch.setattr(toys.learner, "fit", broken)
    with caplog.at_level(logging.ERROR, "fedlora"):
        found = resident.ask("run", body(toys, "c0", "c1"), lambda: None)
    assert [answer.problem for answer in found] == ["RuntimeError", "RuntimeError"]


def test_a_site_keeps_what_its_owner_does_not_allow(resident: Resident, toys: Fleet) -> None:
    hello, ready = resident.runs["run"]
    limits = Allowed(steps=10**6, seconds=1e6, bytes=100)
    resident.runs["run"] = hello, Ready(**{**vars(ready), "allow": limits})
    (answer,) = resident.ask("run", body(toys, "c0"), lambda: None)
    assert answer.reply is None
    assert "[allow] bytes" in answer.problem


def test_a_worker_started_anew_knows_the_run(resident: Resident, toys: Fleet) -> None:
    again = site("north", toys.inner, toys.learner, resident.folder)
    assert again.known("run").presence.clients == tuple(toys.clients[name] for name in sorted(toys.clients))


def test_a_refusal_is_told_with_its_reason(tmp_path: Path) -> None:
    from fedlora.errors import UserError

    def refuse(folder: Path, hello: Any) -> Ready:
        raise UserError("label 'ham' is unknown", "map it")

    found = Resident(tmp_path, refuse).answer(GREETING, "run", HELLO.plain(), lambda: None)
    assert "label 'ham' is unknown" in Presence.from_plain(found).refused
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- the socket between ClientApp and worker


@pytest.fixture
def sockets(resident: Resident, tmp_path: Path) -> Path:
    """The folder of a socket at which the resident answers in a thread of its own, as the worker does."""
    folder = prepare(tmp_path / "s")
    listener = listen(folder)

    def serve() -> None:
        torch.set_num_threads(1)
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                worker.answer(resident, connection, (folder / SECRET).read_bytes())
            except (Refused, EOFError, OSError):
                pass
            finally:
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return folder


def test_the_client_app_hands_over_and_back(sockets: Path, toys: Fleet) -> None:
    header = Header("n", ASK, "run", 1, 30.0)
    found = answers_of(decode(client_app.handed(sockets, header, encode(body(toys, "c1")))))
    assert [answer.client for answer in found] == ["c1"]
    assert found[0].reply is not None


def test_a_failure_of_the_worker_is_told_at_once(sockets: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="the site's worker failed: Unreadable"):
        client_app.handed(sockets, Header("n", ASK, "run", 1, 30.0), encode([{"client": 3}]))
    assert time.monotonic() - start < 10


def test_after_an_asker_that_hung_up_the_next_is_answered(sockets: Path, toys: Fleet) -> None:
    channel = connect(sockets)
    channel.send(b'{"kind": "ask", "run": "run", "seconds": 30}')
    channel.close()
    found = client_app.handed(sockets, Header("n", ASK, "run", 1, 30.0), encode(body(toys, "c0")))
    assert answers_of(decode(found))[0].reply is not None


def test_without_a_worker_the_deadline_ends_it(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="does not answer"):
        client_app.handed(prepare(tmp_path / "none"), Header("n", ASK, "run", 1, 0.05), b"")
