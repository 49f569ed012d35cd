"""The ClientApp: hands each message to the site's resident worker and its answer back. It reads no frame.

Flower starts a process for every message, so nothing heavy may be imported here.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.engines.flower.channel import connect
from fedlora.engines.flower.records import Header, frame_of, header_of, pack

app = ClientApp()
RETRY = 0.2


@app.query()
def ask(message: Message, context: Context) -> Message:
    """One question to the worker."""
    header = header_of(message.content)
    folder = Path(str(context.node_config["sockets"]))
    frame = handed(folder, header, frame_of(message.content))
    return Message(pack(header, frame), reply_to=message)


def handed(folder: Path, header: Header, frame: bytes) -> bytes:
    """The worker's answer to a frame. A worker that is just being started is waited for, until the deadline."""
    end = time.monotonic() + header.seconds
    while True:
        try:
            channel = connect(folder)
        except (OSError, EOFError):
            if time.monotonic() > end:
                raise TimeoutError("the site's worker does not answer") from None
            time.sleep(RETRY)
            continue
        try:
            left = max(end - time.monotonic(), 0.1)
            channel.send(json.dumps({"kind": header.kind, "run": header.run, "seconds": left}).encode())
            channel.send(frame)
            channel.socket.settimeout(left)
            if problem := json.loads(channel.receive())["problem"]:
                raise RuntimeError(problem)
            return channel.receive()
        except (EOFError, ConnectionError):  # the worker was ended: its successor is asked again
            if time.monotonic() > end:
                raise
            time.sleep(RETRY)
        finally:
            channel.close()
