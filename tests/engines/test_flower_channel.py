"""The socket of a site's worker: who may knock, and what is refused."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.engines.flower import channel
from fedlora.engines.flower.channel import Channel, Refused, connect, listen, prepare, secret_of, welcome


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path / "s")


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[Channel, Channel]]:
    """(worker's side, asker's side)."""
    listener = listen(folder)
    sides: list[Channel] = []
    thread = threading.Thread(target=lambda: sides.append(welcome(listener.accept()[0], secret_of(folder))))
    thread.start()
    asker = connect(folder)
    thread.join()
    yield sides[0], asker
    for one in (*sides, asker):
        one.close()
    listener.close()


def refusal(folder: Path, secret: bytes) -> list[str]:
    """What a worker says of whoever connects now."""
    said: list[str] = []

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            try:
                welcome(connection, secret)
            except (Refused, EOFError) as problem:
                said.append(str(problem))

    listener = listen(folder)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        connect(folder).close()
    except (Refused, EOFError, ConnectionError) as problem:
        said.append(str(problem))
    thread.join()
    return said


def test_frames_go_both_ways(pair: tuple[Channel, Channel]) -> None:
    worker, asker = pair
    large = os.urandom(100_000)
    for content in (b"", b"question", large[:70_000]):
        asker.send(content)
        assert worker.receive() == content
    worker.send(b"answer")
    assert asker.receive() == b"answer"
    assert not worker.gone
    asker.close()
    assert worker.gone
    with pytest.raises(EOFError):
        worker.receive()


def test_only_the_owner_may_enter(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / channel.SECRET).stat().st_mode & 0o777 == 0o600
    listen(folder).close()
    assert (folder / channel.SOCKET).stat().st_mode & 0o777 == 0o600
    folder.chmod(0o755)
    with pytest.raises(Refused, match="open to other users"):
        listen(folder)
    with pytest.raises(Refused, match="open to other users"):
        connect(folder)


def test_who_does_not_know_the_secret_is_refused(folder: Path) -> None:
    said = refusal(folder, os.urandom(32))
    assert any("does not know the secret" in text for text in said)
    assert len(said) == 2  # the asker is told nothing, but does not believe either


def test_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "peer", lambda connection: os.getuid() + 1)
    assert any(f"user {os.getuid() + 1} knocked" in text for text in refusal(folder, secret_of(folder)))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user to try it")
def test_another_user_cannot_even_open_the_socket(folder: Path) -> None:
    listener = listen(folder)
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        knock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os._exit(0 if knock.connect_ex(os.fspath(folder / channel.SOCKET)) else 1)
    _, status = os.waitpid(child, 0)
    listener.close()
    assert status == 0


def test_a_frame_beyond_the_limit_is_refused_unread(pair: tuple[Channel, Channel]) -> None:
    worker, asker = pair
    asker.socket.sendall((1 << 30).to_bytes(8, "big") + bytes(32))  # says 1 GB; nothing follows
    with pytest.raises(Refused, match="1073741824 bytes"):
        worker.receive(limit=1 << 20)


@pytest.mark.parametrize("twist", ["content", "replay", "direction"])
def test_what_is_not_authentic_is_refused(twist: str, pair: tuple[Channel, Channel]) -> None:
    worker, asker = pair
    frame = b"train, please"
    tag = asker._tag(b"worker" if twist == "direction" else b"asker", 0, frame)
    sent = len(frame).to_bytes(8, "big") + tag + (frame if twist != "content" else b"train, pleasE")
    asker.socket.sendall(sent)
    if twist == "replay":
        assert worker.receive() == frame
        asker.socket.sendall(sent)
    with pytest.raises(Refused, match="not authentic"):
        worker.receive()
