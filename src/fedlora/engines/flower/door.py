"""The one port that a server shows to the network: ``python -m fedlora.engines.flower.door ...``.

Flower serves its whole interface on one port, and whoever reaches that port may register keys and start runs. So the
SuperLink listens on the loopback interface, and this door passes on what SuperNodes say (``/v1/fleet/``), over TLS,
and nothing else. It also bounds what a node may send: one request, and all that belongs to one message.
"""

from __future__ import annotations

import argparse
import logging
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

log = logging.getLogger("fedlora.door")
FLEET = "/v1/fleet/"
KEY = b"flwr-public-key"
REQUEST = 32 << 20
"""Bytes of one request: Flower cuts messages into objects, of at most 4 MiB where this engine made them."""
MESSAGE = 256 << 20
"""Bytes of the objects of one message."""
HOP = {b"host", b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"expect"}
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class TooLarge(Exception):
    """More bytes than anybody may send."""


@dataclass(eq=False)
class Door:
    """An ASGI application. ``target``: the SuperLink's URL; ``sent``: bytes of each key's message so far."""

    target: str
    verify: ssl.SSLContext | bool
    request: int = REQUEST
    message: int = MESSAGE
    sent: dict[bytes, int] = field(default_factory=dict[bytes, int])
    client: httpx.AsyncClient | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            return None
        path, who = scope["path"], (scope.get("client") or ("?",))[0]
        if scope["method"] != "POST" or not path.startswith(FLEET) or ".." in path or "%" in path:
            log.warning("refused %s: %s %s is not for the network", who, scope["method"], path[:80])
            return await answer(send, 404)
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in HOP]
        key = dict(headers).get(KEY, b"")
        if path.endswith("/push-messages"):
            self.sent.pop(key, None)
        counted = path.endswith("/push-object")
        content = bytearray()
        accepted = False
        try:
            async for part in self._body(receive):
                content += part
                if counted and self._count(key, len(part)) > self.message:
                    raise TooLarge(f"a message of more than {self.message:,} bytes")
            accepted = await self._passed_on(path, headers, bytes(content), send, who)
        except TooLarge as problem:
            log.warning("refused %s: %s: %s", who, path, problem)
            await answer(send, 413)
        except httpx.TransportError as problem:
            log.warning("the SuperLink does not answer: %s", type(problem).__name__)
            await answer(send, 503)  # SuperNodes try again
        finally:
            if counted and not accepted:
                self._count(key, -len(content))
        return None

    def _count(self, key: bytes, size: int) -> int:
        """The bytes of a key's message with these, or without them where they were refused; a key that has sent nothing
        is forgotten, for anybody can invent one."""
        total = self.sent.pop(key, 0) + size
        if total > 0:
            self.sent[key] = total
        return total

    async def _body(self, receive: Receive) -> AsyncIterator[bytes]:
        """The body as it comes: nothing of what is too large is kept."""
        size, more = 0, True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise httpx.ReadError("the node has hung up")
            part, more = event.get("body", b""), event.get("more_body", False)
            size += len(part)
            if size > self.request:
                raise TooLarge(f"a request of more than {self.request:,} bytes")
            yield part

    async def _passed_on(
        self, path: str, headers: list[tuple[bytes, bytes]], content: bytes, send: Send, who: str
    ) -> bool:
        """Whether the SuperLink took it; its answer goes back."""
        assert self.client is not None
        async with self.client.stream("POST", self.target + path, headers=headers, content=content) as found:
            if 400 <= found.status_code < 500:
                log.warning("refused %s: %s: %d", who, path, found.status_code)
            kept = [(name, value) for name, value in found.headers.raw if name.lower() not in HOP]
            await send({"type": "http.response.start", "status": found.status_code, "headers": kept})
            async for part in found.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            return found.status_code < 400

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=64)
        self.client = httpx.AsyncClient(verify=self.verify, timeout=600.0, limits=limits, trust_env=False)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.client.aclose()
        await send({"type": "lifespan.shutdown.complete"})


async def answer(send: Send, status: int) -> None:
    """An answer without a word."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b""})


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="door")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--target", required=True, help="the SuperLink's URL on the loopback interface")
    parser.add_argument("--ca", help="what vouches for the SuperLink")
    parser.add_argument("--cert")
    parser.add_argument("--key")
    parser.add_argument("--message", type=int, default=MESSAGE)
    said = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    verify = ssl.create_default_context(cafile=said.ca) if said.ca else False
    uvicorn.run(
        Door(said.target, verify, message=said.message),  # type: ignore[arg-type]
        host=said.host,
        port=said.port,
        ssl_certfile=said.cert,
        ssl_keyfile=said.key,
        access_log=False,
        log_level="warning",
        limit_concurrency=512,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
        server_header=False,
    )


if __name__ == "__main__":
    main()
