"""The door lets through what SuperNodes say, unchanged, and nothing else; what is too large is not even read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
door = pytest.importorskip("fedlora.engines.flower.door")


class Behind:
    """The SuperLink: keeps what reaches it and answers with it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[bytes, bytes], bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        self.seen.append((scope["path"], dict(scope["headers"]), body))
        status = 401 if b"stranger" in body else 200
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-own", b"1")]})
        await send({"type": "http.response.body", "body": b"got " + body})


def asked(behind: Behind, *requests: tuple[str, str, bytes | AsyncIterator[bytes], bytes], **limits: int) -> list[Any]:
    """The answers to (method, path, body, key), one after the other."""

    async def go() -> list[Any]:
        app = door.Door("http://superlink", False, **limits)
        app.client = httpx.AsyncClient(transport=httpx.ASGITransport(behind))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door") as client:
            return [
                await client.request(method, path, content=body, headers={"flwr-public-key": key.decode()})
                for method, path, body, key in requests
            ]

    return asyncio.run(go())


def test_what_a_node_says_passes_unchanged() -> None:
    behind = Behind()
    [answer] = asked(behind, ("POST", "/v1/fleet/pull-messages", b"\x00hello", b"k"))
    assert (answer.status_code, answer.content, answer.headers["x-own"]) == (200, b"got \x00hello", "1")
    [(path, headers, body)] = behind.seen
    assert (path, body, headers[b"flwr-public-key"]) == ("/v1/fleet/pull-messages", b"\x00hello", b"k")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/register-node"),
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/runtime/push-task-output"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("POST", "//v1/fleet/x"),
        ("GET", "/v1/fleet/pull-messages"),
        ("GET", "/docs"),
        ("GET", "/health"),
    ],
)
def test_nothing_else_passes(method: str, path: str, caplog: pytest.LogCaptureFixture) -> None:
    behind = Behind()
    with caplog.at_level(logging.WARNING):
        [answer] = asked(behind, (method, path, b"", b"k"))
    assert answer.status_code == 404
    assert behind.seen == []
    assert "is not for the network" in caplog.text


def test_a_request_that_is_too_large_is_not_read_to_its_end(caplog: pytest.LogCaptureFixture) -> None:
    given = 0

    async def gigabyte() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(1024):
            given += 1
            yield bytes(1 << 20)

    behind = Behind()
    with caplog.at_level(logging.WARNING):
        [answer] = asked(behind, ("POST", "/v1/fleet/push-object", gigabyte(), b"k"))
    assert answer.status_code == 413
    assert behind.seen == []
    assert given <= 34
    assert "a request of more than" in caplog.text


def test_a_message_in_many_pieces_is_bounded_too_and_by_sender(caplog: pytest.LogCaptureFixture) -> None:
    piece = ("POST", "/v1/fleet/push-object", bytes(100))
    begin = ("POST", "/v1/fleet/push-messages", b"")
    behind = Behind()
    requests = [(*piece, b"a")] * 3 + [(*piece, b"b"), (*piece, b"a"), (*begin, b"a"), (*piece, b"a")]
    with caplog.at_level(logging.WARNING):
        found = [answer.status_code for answer in asked(behind, *requests, message=350)]
    assert found == [200, 200, 200, 200, 413, 200, 200]
    assert "a message of more than 350 bytes" in caplog.text


@pytest.mark.parametrize("body", [b"stranger", bytes(400)])
def test_keys_that_anybody_can_invent_are_not_kept(body: bytes) -> None:
    async def go() -> door.Door:
        app = door.Door("http://superlink", False, message=350)
        app.client = httpx.AsyncClient(transport=httpx.ASGITransport(Behind()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door") as client:
            for number in range(5):
                key = {"flwr-public-key": str(number)}
                answer = await client.post("/v1/fleet/push-object", content=body, headers=key)
                assert answer.status_code in (401, 413)
        return app

    assert asyncio.run(go()).sent == {}


def test_what_is_sent_again_counts_once() -> None:
    class Busy(Behind):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if not self.seen:
                self.seen.append(("", {}, b""))
                raise httpx.ConnectError("refused")
            await super().__call__(scope, receive, send)

    piece = ("POST", "/v1/fleet/push-object", bytes(200), b"k")
    assert [answer.status_code for answer in asked(Busy(), piece, piece, message=350)] == [503, 200]


def test_who_is_refused_behind_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        [answer] = asked(Behind(), ("POST", "/v1/fleet/activate-node", b"stranger", b"k"))
    assert answer.status_code == 401
    assert "/v1/fleet/activate-node: 401" in caplog.text


def test_a_superlink_that_is_away_is_asked_again_later() -> None:
    class Away(Behind):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            raise httpx.ConnectError("refused")

    [answer] = asked(Away(), ("POST", "/v1/fleet/pull-messages", b"", b"k"))
    assert answer.status_code == 503
