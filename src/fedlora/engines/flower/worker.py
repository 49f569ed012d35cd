"""The resident worker of a site: ``python -m fedlora.engines.flower.worker SITE_FOLDER SOCKET_FOLDER``.

It holds the base model, the tokenised data and the lanes, and answers one question after the other on a local socket
(see ``channel``). Who hung up is not worked for any longer.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from fedlora.engines.flower.channel import LIMIT, SECRET, Channel, Refused, listen, welcome

log = logging.getLogger("fedlora.worker")
NOTE = 1 << 16


def serve(folder: Path, sockets: Path) -> None:
    """Answers until the process is ended."""
    secret = (sockets / SECRET).read_bytes()
    listener = listen(sockets)
    from fedlora.engines.flower.resident import Resident  # torch and everything: while the first question is on its way

    resident = Resident(folder)
    log.info("site %s is ready", resident.name)
    while True:
        connection, _ = listener.accept()
        try:
            answer(resident, connection, secret)
        except (Refused, EOFError, OSError) as problem:
            log.warning("a connection ended: %s", problem)
        except Exception:
            log.exception("a connection ended")
        finally:
            connection.close()


def answer(resident: object, connection: socket.socket, secret: bytes) -> None:
    """One question, two frames: {kind, run, seconds} as JSON, and its body; the answer likewise: {problem}, and a body
    where there is none."""
    from fedlora.engines.flower.resident import Resident
    from fedlora.federation.wire import decode, encode

    assert isinstance(resident, Resident)
    channel = welcome(connection, secret)
    said = json.loads(channel.receive(NOTE))
    end = time.monotonic() + said["seconds"]

    def stop() -> str | None:
        if channel.gone:
            return "who asked has hung up"
        return "the deadline has passed" if time.monotonic() > end else None

    body = decode(channel.receive(LIMIT))
    try:
        found = encode(resident.answer(said["kind"], said["run"], body, stop))
    except Exception as problem:
        log.exception("a question could not be answered")
        channel.send(json.dumps({"problem": f"the site's worker failed: {type(problem).__name__}"}).encode())
    else:
        channel.send(json.dumps({"problem": ""}).encode())
        channel.send(found)
    wait_for_end(channel)


def wait_for_end(channel: Channel, seconds: float = 5.0) -> None:
    """Until the other end has read everything and hung up."""
    channel.socket.settimeout(seconds)
    channel.socket.recv(1)


def die_with(parent: int) -> None:
    """Ends this process when its parent is gone, however that ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Entry point."""
    folder, sockets = (Path(word) for word in sys.argv[1:3])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    die_with(os.getppid())
    serve(folder, sockets)


if __name__ == "__main__":
    main()
