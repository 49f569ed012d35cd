"""Flower's own programs and the site workers as child processes: started, watched and stopped; output to log files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w

from fedlora import __version__
from fedlora.engines.flower import channel, leash
from fedlora.errors import Interrupted, UserError

HOST = "127.0.0.1"
APP = {
    "project": {"name": "fedlora-run", "version": __version__, "license": "Apache-2.0", "dependencies": []},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "fedlora",
                "components": {
                    "serverapp": "fedlora.engines.flower.server_app:app",
                    "clientapp": "fedlora.engines.flower.client_app:app",
                },
                "config": {"folder": ""},
            }
        }
    },
}
"""The shim that Flower distributes: it names modules of the installed package and holds no code."""


def environment(home: Path) -> dict[str, str]:
    """What Flower's programs are started with: no telemetry, quick polling, this installation's programs first."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_UPDATE_CHECK": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "FLWR_HOME": os.fspath(home),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """A port of the loopback interface that nobody uses."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def require_free(host: str, port: int, patience: float = 5.0) -> None:
    """UserError where nobody could listen there. What a killed server left behind is given a moment to end."""
    end = time.monotonic() + patience
    while True:
        try:
            for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                with socket.socket(family, kind) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the door: old connections linger
                    if family == socket.AF_INET6:
                        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    probe.bind(place)
            return
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            if not taken or time.monotonic() >= end:
                raise UserError(
                    f"--port {port}: cannot listen on {host}:{port}: {error.strerror}",
                    "stop what uses it, or give --port" if taken else "give another --host or --port",
                ) from None
            time.sleep(0.1)


@dataclass(eq=False)
class Process:
    """A child in a session of its own, so that all it starts ends with it; on Linux it ends with this process, however
    that ends."""

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str]
    child: subprocess.Popen[bytes] | None = None

    def start(self) -> Process:
        """Starts it; its output is added to its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        held = [sys.executable, "-IS", leash.__file__, str(os.getpid())] if sys.platform == "linux" else []
        with self.log.open("ab") as out:
            self.child = subprocess.Popen(
                [*held, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(self.env),
                start_new_session=True,
            )
        return self

    @property
    def running(self) -> bool:
        """It was started and has not ended."""
        return self.child is not None and self.child.poll() is None

    def stop(self, patience: float = 5.0) -> None:
        """Asks it to end, then ends it and everything of its session."""
        if self.child is None:
            return
        if self.child.poll() is None:
            self.child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(patience)
        self.kill()

    def kill(self) -> None:
        """Ends it and everything of its session at once."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()

    def tail(self, lines: int = 5) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


@dataclass(eq=False)
class SuperLink:
    """Flower's server in a folder: its state in ``state.db``, its apps and settings in ``home/``."""

    folder: Path
    port: int = 0
    host: str = HOST
    secure: Sequence[str] = ("--insecure",)
    process: Process | None = field(default=None)

    @property
    def address(self) -> str:
        """Where sites dial."""
        return f"{self.host}:{self.port}"

    def start(self) -> SuperLink:
        """Starts it and waits until it listens; the port stays the same for a later start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        words = ["flower-superlink", *self.secure, "--host", self.host, "--port", str(self.port)]
        words += ["--database", os.fspath(self.folder / "state.db"), "--disable-runtime-dependency-installation"]
        log = self.folder / "superlink.log"
        self.process = Process("SuperLink", words, log, environment(self.folder / "home")).start()
        wait_for_port(self.host, self.port, self.process)
        return self

    def submit(self, run: Path, root: Path | None = None) -> int:
        """Submits the run of a folder: Flower's number of it."""
        home, app = self.folder / "home", self.folder / "app"
        for place in (home, app):
            place.mkdir(parents=True, exist_ok=True)
        (app / "pyproject.toml").write_text(tomli_w.dumps(APP))
        security = {"root-certificates": os.fspath(root)} if root else {"insecure": True}
        link = {"default": "run", "run": {"address": self.address, **security}}
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": link}))
        words = ["flwr", "run", os.fspath(app), "run", "--format", "json", "--run-config"]
        words.append(f"folder={json.dumps(os.path.abspath(run))}")
        done = subprocess.run(words, capture_output=True, text=True, env=environment(home), stdin=subprocess.DEVNULL)
        with (self.folder / "flwr.log").open("a") as out:
            out.write(done.stdout + done.stderr)
        try:
            return int(json.loads(done.stdout)["run-id"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"Flower did not take the run: {(done.stderr or done.stdout).strip()[-500:]}",
                f"look into {self.folder / 'superlink.log'}",
            ) from None


@dataclass(eq=False)
class SiteProcesses:
    """A site: its worker, its SuperNode, and the runner that takes messages from the one to the other."""

    folder: Path
    superlink: str
    secure: Sequence[str] = ("--insecure",)
    port: int = 0
    sockets: Path | None = None
    worker: Process | None = None
    node: Process | None = None
    runner: Process | None = None

    def start(self) -> SiteProcesses:
        """Starts all. The socket lies in a short path of its own: the system limits its length."""
        self.sockets = channel.prepare(Path(tempfile.mkdtemp(prefix="fedlora-")))
        self.start_worker()
        self.start_node()
        return self

    def start_worker(self) -> None:
        """Starts the worker."""
        words = [sys.executable, "-m", "fedlora.engines.flower.worker", os.fspath(self.folder), str(self.sockets)]
        self.worker = Process("worker", words, self.folder / "logs" / "worker.log", dict(os.environ)).start()

    def start_node(self) -> None:
        """Starts the SuperNode with its runner."""
        self.port = free_port()
        words = ["flower-supernode", *self.secure, "--superlink", self.superlink]
        words += ["--node-config", f'sockets="{self.sockets}"']
        words += ["--host", HOST, "--port", str(self.port), "--isolation", "process"]
        words += ["--superexec-auth-secret-file", f"{self.sockets}/{channel.SECRET}"]
        log = self.folder / "logs" / "supernode.log"
        self.node = Process("SuperNode", words, log, environment(self.folder / "flower")).start()
        self.start_runner()

    def start_runner(self) -> None:
        """Starts the runner."""
        if self.runner is not None:
            self.runner.stop()
        words = [sys.executable, "-m", "fedlora.engines.flower.runner", f"{HOST}:{self.port}", str(self.sockets)]
        log = self.folder / "logs" / "runner.log"
        self.runner = Process("runner", words, log, environment(self.folder / "flower")).start()

    def watch(self) -> None:
        """Starts again what has ended by itself."""
        if self.worker is not None and not self.worker.running:
            self.start_worker()
        if self.node is not None and not self.node.running:
            self.start_node()
        if self.runner is not None and not self.runner.running:
            self.start_runner()

    def stop(self) -> None:
        """Stops all and removes the socket."""
        for process in (self.runner, self.node, self.worker):
            if process is not None:
                process.stop()
        if self.sockets is not None:
            shutil.rmtree(self.sockets, ignore_errors=True)


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """SIGTERM (systemd, Compose) stops like Ctrl-C: children first, and with a word on how to go on. A second one, of
    somebody who does not want to wait, or of a supervisor that signals twice, leaves no child behind."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main program's
        yield
        return

    def stop(*_: object) -> None:
        for name in before:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    found = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    before = {name: handler for name, handler in found.items() if handler not in (None, signal.SIG_IGN)}
    for name in before:
        signal.signal(name, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(message) from None
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def wait_for_port(host: str, port: int, process: Process, seconds: float = 60.0) -> None:
    """Until it listens; UserError where it ends instead, also if somebody else does."""
    end = time.monotonic() + seconds
    while process.running and time.monotonic() < end:
        try:
            socket.create_connection((host, port), 1.0).close()
        except OSError:
            time.sleep(0.1)
        else:
            if process.running:
                return
    raise UserError(f"{process.name} did not start: {process.tail()}", f"look into {process.log}")
