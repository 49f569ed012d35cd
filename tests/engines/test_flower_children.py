"""Programs that a server starts: they end with it however it ends, and nobody else is taken for them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from engines.commands import ENVIRONMENT, command
from fedlora.engines.flower.deployed import serve
from fedlora.engines.flower.federate import alive
from fedlora.engines.flower.processes import HOST, Process, free_port, require_free, wait_for_port
from fedlora.errors import UserError
from fedlora.study.config import parse
from study import tiny

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")


def until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A port of the loopback interface on which somebody listens."""
    with socket.create_server((HOST, 0)) as listener:
        yield listener


PARENT = """
import os, signal, sys
from pathlib import Path
from fedlora.engines.flower.processes import Process
child = Process("sleeper", ["sleep", "600"], Path(sys.argv[1]), os.environ).start().child
print(child.pid, flush=True)
signal.pause()
"""


@linux
def test_a_child_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=ENVIRONMENT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    try:
        until(lambda: not alive(child))
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)


def test_a_child_is_the_program_itself(tmp_path: Path) -> None:
    """Its process id and its environment are those that were asked for."""
    text = "import os; print(os.getpid(), os.environ['WHO'])"
    one = Process("one", [sys.executable, "-c", text], tmp_path / "log", {**os.environ, "WHO": "me"}).start()
    assert one.child is not None
    assert one.child.wait(60) == 0
    assert one.tail() == f"{one.child.pid} me"
    none = Process("none", ["no-such-program"], tmp_path / "log", os.environ)
    with contextlib.suppress(FileNotFoundError):
        none.start()
        assert none.child is not None
        assert none.child.wait(60) != 0
        assert "no-such-program" in none.tail()


def test_a_port_that_is_taken_is_an_error_before_anything_starts(
    taken: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.engines.flower.deployed.require_free", partial(require_free, patience=0.0))
    port = taken.getsockname()[1]
    config = parse(
        {
            "model": {"name": str(tmp_path / "nowhere"), "task": "text-classification"},
            "data": {"labels": ["a", "b"], "text": "text"},
            "algorithm": {"name": "fedit"},
        },
        "run.toml",
    )
    for host in (HOST, "0.0.0.0"):
        with pytest.raises(
            UserError, match=rf"--port {port}: cannot listen on {host}:{port}: .* in use\n.*give --port"
        ):
            serve(config, "run", tmp_path / "server", insecure=True, host=host, port=port)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="another --host"):
        require_free("192.0.2.1", port, 0.0)  # of no machine


def test_a_port_that_is_given_up_is_waited_for(taken: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    port = taken.getsockname()[1]
    monkeypatch.setattr("fedlora.engines.flower.processes.time.sleep", lambda seconds: taken.close())
    require_free(HOST, port)


def test_who_listens_in_the_place_of_a_program_that_ended_is_not_taken_for_it(
    taken: socket.socket, tmp_path: Path
) -> None:
    text = "print('address already in use')"
    door = Process("door", [sys.executable, "-c", text], tmp_path / "log", os.environ).start()
    assert door.child is not None
    door.child.wait(60)
    with pytest.raises(UserError, match="door did not start: address already in use"):
        wait_for_port(HOST, taken.getsockname()[1], door)


@linux
@pytest.mark.slow
def test_a_killed_server_leaves_nothing_behind_and_starts_again(tmp_path: Path) -> None:
    tiny.encoder(tmp_path / "base")
    (tmp_path / "run.toml").write_text(
        f'[model]\nname = "{tmp_path / "base"}"\ntask = "text-classification"\n[data]\nlabels = ["a", "b"]\n'
        '[algorithm]\nname = "fedit"\n'
    )
    port, log = free_port(), tmp_path / "log"
    place = ["--folder", tmp_path / "server", "--host", HOST, "--port", port]
    words = command("server", "start", tmp_path / "run.toml", "--insecure", *place)
    for count in (1, 2):
        with (
            log.open("ab") as out,
            subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT) as server,
        ):
            try:
                until(lambda count=count: log.read_text().count("listening on") == count or server.poll() is not None)
                assert server.poll() is None, log.read_text()
                started = descendants(server.pid)
                assert len(started) >= 2
            finally:
                server.kill()
    until(lambda: not any(map(alive, started)))


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    own = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*own, *(other for child in own for other in descendants(child))]
