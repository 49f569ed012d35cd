"""A local socket between a site's worker and whoever brings it messages: authenticated, framed, bounded.

The socket lies in a folder that only its owner may enter, both sides prove that they know the folder's secret, and the
kernel says whose process is at the other end. A frame is its length (8 bytes), an HMAC-SHA256 over direction, number
and content, and the content. Needs neither torch nor flwr: it is imported for every message.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

LIMIT = 1 << 30
"""Bytes of one frame."""
NONCE, DIGEST = 32, 32
SECRET, SOCKET = "secret", "worker.sock"
PATIENCE = 10.0
"""Seconds for a greeting."""


class Refused(Exception):
    """The other end is not who it should be, or what it sent is not what was agreed."""


def prepare(folder: Path) -> Path:
    """Makes the folder of a socket (0700) with a fresh secret (0600)."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    file = folder / SECRET
    file.unlink(missing_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as out:
        out.write(secrets.token_bytes(32))
    return folder


def secret_of(folder: Path) -> bytes:
    """The secret of a folder that nobody else may enter."""
    about = folder.stat()
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
        raise Refused(f"{folder} is open to other users: make it yours alone (chmod 700)")
    return (folder / SECRET).read_bytes()


@dataclass(eq=False)
class Channel:
    """One authenticated connection; either side sends and receives whole frames."""

    socket: socket.socket
    key: bytes
    ours: bytes
    theirs: bytes
    sent: int = 0
    received: int = 0

    def send(self, frame: bytes) -> None:
        """Sends one frame."""
        tag = self._tag(self.ours, self.sent, frame)
        self.sent += 1
        self.socket.sendall(len(frame).to_bytes(8, "big") + tag)
        self.socket.sendall(frame)

    def receive(self, limit: int = LIMIT) -> bytes:
        """The next frame; Refused where it is longer than the limit or not authentic, EOFError at the end."""
        head = _exactly(self.socket, 8 + DIGEST)
        size = int.from_bytes(head[:8], "big")
        if size > limit:
            raise Refused(f"a frame of {size} bytes is above the limit of {limit}")
        frame = _exactly(self.socket, size)
        if not hmac.compare_digest(head[8:], self._tag(self.theirs, self.received, frame)):
            raise Refused("a frame is not authentic")
        self.received += 1
        return frame

    def close(self) -> None:
        """Ends the connection."""
        self.socket.close()

    @property
    def gone(self) -> bool:
        """The other end has hung up (nothing is read)."""
        try:
            return self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _tag(self, direction: bytes, number: int, frame: bytes) -> bytes:
        made = hmac.new(self.key, direction + number.to_bytes(8, "big"), hashlib.sha256)
        made.update(frame)
        return made.digest()


def listen(folder: Path) -> socket.socket:
    """The worker's socket in a prepared folder; one that a dead worker left behind is replaced."""
    secret_of(folder)
    path = folder / SOCKET
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with masked(0o177):
        listener.bind(os.fspath(path))
    listener.listen(8)
    return listener


def welcome(connection: socket.socket, secret: bytes) -> Channel:
    """The worker's side of a greeting; Refused for other users and for who does not know the secret."""
    user = peer(connection)
    if user not in (None, os.getuid()):
        raise Refused(f"user {user} knocked at the worker of user {os.getuid()}")
    connection.settimeout(PATIENCE)
    ours = secrets.token_bytes(NONCE)
    connection.sendall(ours)
    greeting = _exactly(connection, NONCE + DIGEST)
    nonces = ours + greeting[:NONCE]
    if not hmac.compare_digest(greeting[NONCE:], _proof(secret, b"asker", nonces)):
        raise Refused("who knocked does not know the secret")
    connection.sendall(_proof(secret, b"worker", nonces))
    connection.settimeout(None)
    return Channel(connection, _proof(secret, b"key", nonces), b"worker", b"asker")


def connect(folder: Path) -> Channel:
    """The asker's side; OSError where no worker listens, Refused where it is an impostor."""
    secret = secret_of(folder)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(PATIENCE)
        connection.connect(os.fspath(folder / SOCKET))
        theirs = _exactly(connection, NONCE)
        ours = secrets.token_bytes(NONCE)
        nonces = theirs + ours
        connection.sendall(ours + _proof(secret, b"asker", nonces))
        if not hmac.compare_digest(_exactly(connection, DIGEST), _proof(secret, b"worker", nonces)):
            raise Refused("who answers is not the worker")
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return Channel(connection, _proof(secret, b"key", nonces), b"asker", b"worker")


def peer(connection: socket.socket) -> int | None:
    """The user at the other end; None where the system does not say."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    return user


class masked:
    """New files get no more than these permissions inside the block."""

    def __init__(self, mask: int) -> None:
        self.mask = mask

    def __enter__(self) -> None:
        self.before = os.umask(self.mask)

    def __exit__(self, *exception: object) -> None:
        os.umask(self.before)


def _proof(secret: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.new(secret, role + nonces, hashlib.sha256).digest()


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError("the other end has hung up")
        parts += part
    return bytes(parts)
