"""docs/federation.md followed literally, each machine in a network namespace of its own; and who is not let in."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("flwr")
pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "federation.md"
ADDRESSES = {"fed": "10.77.0.1", "north": "10.77.0.2", "south": "10.77.0.3"}
NAMES = {"fed": "fed.example.org"}
SHAPES = (("netem", "delay", "10ms", "loss", "0.5%"), ("tbf", "rate", "20mbit", "burst", "8kb", "latency", "10ms"))
"""Delay and loss of every interface: by chance, or, where the kernel has no netem, by a short queue before a slow line,
which holds packets up and drops those that find it full."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why this machine cannot have network namespaces; empty where it can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"fl{os.getpid()}p"
    try:
        ip("netns", "add", probe)
        try:
            ip("-n", probe, "link", "add", "name", "one", "type", "veth", "peer", "name", "two")
        finally:
            ip("netns", "del", probe)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"this machine does not allow network namespaces: {getattr(error, 'stderr', error)}"
    return ""


@dataclass
class Machines:
    """Namespaces on a bridge in a namespace of its own, each with a folder, an address and the others' names."""

    root: Path
    tag: str = field(default_factory=lambda: f"fl{os.getpid()}")
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    shape: tuple[str, ...] = ()

    def start(self) -> None:
        hub = f"{self.tag}-hub"
        ip("netns", "add", hub)
        ip("-n", hub, "link", "add", "name", "bridge", "type", "bridge")
        ip("-n", hub, "link", "set", "bridge", "up")
        for name, address in ADDRESSES.items():
            space = self.space(name)
            ip("netns", "add", space)
            ip("-n", hub, "link", "add", "name", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", hub, "link", "set", f"to-{name}", "master", "bridge", "up")
            ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", space, "link", "set", device, "up")
            self.shape = next((shape for shape in SHAPES if self.traffic(space, "add", *shape)), ())
            hosts = Path("/etc/netns") / space / "hosts"
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n{ADDRESSES['fed']} {NAMES['fed']}\n")
            self.folder(name).mkdir()
        copy = self.root / "bin" / "scp"  # the one stand-in: machines are folders here
        copy.parent.mkdir()
        copy.write_text(f'#!/bin/sh\nexec cp "$1" "{self.root}/${{2%%:*}}/${{2#*:}}"\n')
        copy.chmod(0o755)

    def traffic(self, space: str, *words: str) -> bool:
        verb, *shape = words
        line = ["ip", "netns", "exec", space, "tc", "qdisc", verb, "dev", "eth0", "root", *shape]
        return subprocess.run(line, capture_output=True).returncode == 0

    @contextmanager
    def unshaped(self) -> Iterator[None]:
        """A network that loses nothing: what is sent twice would count twice."""
        for name in ADDRESSES if self.shape else ():
            assert self.traffic(self.space(name), "del")
        yield
        for name in ADDRESSES if self.shape else ():
            assert self.traffic(self.space(name), "add", *self.shape)

    def dropped(self, name: str) -> int:
        """Packets that the machine's interface has lost."""
        words = ["ip", "netns", "exec", self.space(name), "tc", "-s", "-j", "qdisc", "show", "dev", "eth0"]
        return sum(one["drops"] for one in json.loads(subprocess.check_output(words)))

    def space(self, name: str) -> str:
        return f"{self.tag}-{name}"

    def folder(self, name: str) -> Path:
        return self.root / name

    def environment(self) -> dict[str, str]:
        path = [str(self.root / "bin"), os.path.dirname(sys.executable), os.environ["PATH"]]
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"}
        return {**os.environ, **quiet, "PATH": os.pathsep.join(path)}

    def words(self, name: str, command: str) -> list[str]:
        return [
            "ip",
            "netns",
            "exec",
            self.space(name),
            "sh",
            "-ec",
            f"cd {shlex.quote(str(self.folder(name)))}\n{command}",
        ]

    def run(self, name: str, command: str, seconds: float = 240) -> str:
        done = subprocess.run(
            self.words(name, command),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{name}$ {command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def stay(self, name: str, command: str) -> subprocess.Popen[bytes]:
        """A program of its own terminal: its output goes to COMMAND.log in the machine's folder."""
        with self.log(name, command).open("wb") as out:
            child = subprocess.Popen(
                self.words(name, f"exec {command.strip()}"),
                env=self.environment(),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.running.append(child)
        return child

    def log(self, name: str, command: str) -> Path:
        return self.folder(name) / (re.sub(r"\W+", "-", command.strip()) + ".log")

    def stop(self) -> None:
        for child in self.running:
            child.send_signal(signal.SIGTERM)
        for child in self.running:
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        for name in (*ADDRESSES, "hub"):
            subprocess.run(["ip", "netns", "del", self.space(name)], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / self.space(name), ignore_errors=True)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    if reason := why_not():
        pytest.skip(reason)
    found = Machines(tmp_path_factory.mktemp("machines"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


def blocks() -> list[tuple[str, list[str], str]]:
    """(language, words after it, text) of every fenced block of the page that names a machine."""
    found = re.findall(r"^```(\w+) ([^\n]+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    return [(language, words.split(), text) for language, words, text in found]


def data(machines: Machines) -> None:
    """What the page says that the clinics have."""
    draw = random.Random(0)
    kind, harsh = ["calm", "mild", "clear", "steady"], ["grave", "severe", "acute", "rapid"]
    for name, file, header, labels in (
        ("north", "befunde.csv", "satz,urteil", ("gut", "schlecht")),
        ("south", "notes.csv", "text,label", ("good", "bad")),
    ):
        lines = [header]
        for i in range(60):
            bad = draw.random() < 0.5
            words = draw.sample(harsh if bad else kind, 2)
            lines.append(f"case {i} of {name} was {words[0]} and {words[1]},{labels[bad]}")
        (machines.folder(name) / file).write_text("\n".join(lines) + "\n")


def until(what: str, seconds: float, held: Callable[[], bool]) -> None:
    """Waits until it holds."""
    end = time.monotonic() + seconds
    while not held():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def walked(machines: Machines) -> dict[str, str]:
    """The page, command by command; what the commands said, by command."""
    data(machines)
    said: dict[str, str] = {}
    server: subprocess.Popen[bytes] | None = None
    for language, (name, *how), text in blocks():
        if language == "toml":
            (machines.folder(name) / how[0]).write_text(text)
            continue
        if how == ["stays"]:
            child = machines.stay(name, text)
            if name == "fed":
                server = child
                log = machines.log(name, text)
                until("the server listens", 90, lambda log=log: b"listening" in log.read_bytes())
            continue
        if how == ["ends"]:
            assert server is not None
            try:
                assert server.wait(300) == 0
            except (AssertionError, subprocess.TimeoutExpired):
                logs = [f"== {f}\n{f.read_text(errors='replace')[-3000:]}" for f in machines.root.rglob("*.log")]
                pytest.fail("\n".join(logs))
        for command in text.strip().splitlines():
            said[f"{name}$ {command}"] = machines.run(name, command)
    return said


def test_the_page_is_followed_to_its_end(machines: Machines, walked: dict[str, str]) -> None:
    folder = machines.folder("fed") / "server" / "runs" / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["rounds"], summary["clients"]) == (2, 2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["participants"], line["rejected"]) for line in lines[1:]] == [(1, 2, {}), (2, 2, {})]
    for name in ("north", "south"):
        check = walked[f"{name}$ fedlora site check {name} --run run.toml"]
        assert "FAIL" not in check
        assert check.count("pass") == 8
        assert list((machines.folder(name) / name / "adapters" / "clients").iterdir())
    assert "rank 4" in walked["north$ fedlora site check north --run run.toml"]
    assert walked['fed$ fedlora predict model --text "a short note"'].strip()


def test_packets_were_lost_on_the_way(machines: Machines, walked: dict[str, str]) -> None:
    if not machines.shape:
        pytest.skip("this kernel has neither netem nor tbf: no delay and no loss")
    assert sum(machines.dropped(name) for name in ADDRESSES) > 0


def test_nothing_of_the_data_is_on_the_server_or_in_a_log(machines: Machines, walked: dict[str, str]) -> None:
    for file in (f for f in machines.folder("fed").rglob("*") if f.is_file()):
        content = file.read_bytes()
        assert b"case 7 of" not in content, file
        assert b"schlecht" not in content, file
    for name in ("north", "south"):
        for log in machines.folder(name).rglob("*.log"):
            assert b"case 7 of" not in log.read_bytes(), log
        assert "leaves " in machines.log(name, f"fedlora site start {name}").read_text()


def test_sites_only_dial_out(machines: Machines, walked: dict[str, str]) -> None:
    if shutil.which("ss") is None:
        pytest.skip("ss (iproute2) is not here")
    for name in ("north", "south"):
        listening = [line.split()[3] for line in machines.run(name, "ss -Hltn").splitlines()]
        assert all(place.startswith(("127.0.0.1:", "[::1]:")) for place in listening), listening


def carried(machines: Machines) -> int:
    """Bytes that have passed the server's interface, both ways, headers included."""
    [told] = json.loads(
        subprocess.check_output(["ip", "-n", machines.space("fed"), "-s", "-j", "link", "show", "eth0"])
    )
    return sum(told["stats64"][way]["bytes"] for way in ("rx", "tx"))


def test_bytes_that_are_counted_are_those_on_the_wire(machines: Machines, walked: dict[str, str]) -> None:
    """Rounds as metrics.jsonl counts them, and the scoring at the end: each site's payload and the server's model,
    whose frame is that of a site which is served the largest rank. The rest is Flower's and TLS's: its share is small
    where what is sent is not."""
    before = carried(machines)
    changes = "--set adapter.rank=64 --set training.rounds=4 --set training.eval_every=0 --out server/runs/wire"
    with machines.unshaped():
        machines.run("fed", f"fedlora server start run.toml --sites 2 {changes}", 400)
    wire = carried(machines) - before
    file = machines.folder("fed") / "server" / "runs" / "wire" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["participants"] for line in lines[1:]] == [2] * 4
    served = {name: one["down"] for name, one in lines[-1]["clients"].items()}
    counted = sum(sum(line["bytes"].values()) for line in lines)
    scoring = sum(served.values()) + 2 * served["south"]
    print(f"wire {wire:,}, rounds {counted:,}, scoring {scoring:,}: {wire / (counted + scoring):.4f}")
    assert counted + scoring < wire < 1.05 * (counted + scoring)


# ---------------------------------------------------------------- who is not let in


@pytest.fixture(scope="module")
def open_server(machines: Machines, walked: dict[str, str]) -> Iterator[None]:
    """The same server again, for a longer run: it waits for its sites, which are still dialling."""
    command = "fedlora server start run.toml --sites 2 --set training.rounds=500"
    child = machines.stay("fed", command)
    log = machines.log("fed", command)
    until("the server listens", 90, lambda: b"listening" in log.read_bytes())
    yield
    child.send_signal(signal.SIGTERM)
    child.wait(30)


def started(machines: Machines, folder: str, seconds: float, *words: str) -> str:
    """What a site that is started on north's machine says, until it says one of the words."""
    child = machines.stay("north", f"fedlora site start {folder}")
    log = machines.log("north", f"fedlora site start {folder}")
    try:
        until(f"{folder} says {words}", seconds, lambda: any(word in log.read_text(errors="replace") for word in words))
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(30)
    return log.read_text(errors="replace")


def test_a_site_without_a_registered_key_stays_out(machines: Machines, open_server: None) -> None:
    machines.run("north", "fedlora site init stranger --server fed.example.org:9092 --ca ca.pem --train ../befunde.csv")
    shown = started(machines, "stranger", 90, "does not know this site's key")
    assert "SuperNode ID" not in shown


def test_a_wrong_authority_is_refused(machines: Machines, open_server: None) -> None:
    machines.run("north", "fedlora server init --host fed.example.org --folder elsewhere")
    machines.run("north", "fedlora site init misled --server fed.example.org:9092 --ca elsewhere/ca.pem")
    shown = started(machines, "misled", 90, "CERTIFICATE_VERIFY_FAILED")
    assert "SuperNode ID" not in shown
    assert "FAIL  certificate" in checked(machines, "misled")


def checked(machines: Machines, folder: str) -> str:
    words = machines.words("north", f"fedlora site check {folder}")
    return subprocess.run(words, env=machines.environment(), capture_output=True, text=True, timeout=120).stdout


def test_an_expired_certificate_is_refused_at_both_ends(machines: Machines, open_server: None) -> None:
    """A server does not start with one; and where one is shown nevertheless, no site goes in."""
    machines.run("fed", "fedlora server init --host fed.example.org --folder old --days -1")
    machines.run("fed", "cp north.pub old/allowed/north.pub; cp old/ca.pem ../north/old.pem")
    words = machines.words("fed", "fedlora server start run.toml --folder old --port 9443")
    done = subprocess.run(words, env=machines.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "server.pem: expired on" in done.stderr
    target = "--port 9443 --target https://127.0.0.1:1 --ca old/ca.pem --cert old/server.pem --key old/server.key"
    door = f"{sys.executable} -m fedlora.engines.flower.door --host 0.0.0.0 {target}"
    child = machines.stay("fed", door)
    machines.run("north", "fedlora site init late --server fed.example.org:9443 --ca old.pem --train ../befunde.csv")
    shown = started(machines, "late", 90, "CERTIFICATE_VERIFY_FAILED")
    assert "certificate has expired" in shown
    line = next(line for line in checked(machines, "late").splitlines() if "certificate" in line)
    assert line.startswith("FAIL")
    assert "expired" in line
    child.send_signal(signal.SIGTERM)


PROBE = """
import ssl, sys, http.client
context = ssl.create_default_context(cafile="ca.pem")
def ask(path, body):
    connection = http.client.HTTPSConnection("fed.example.org", 9092, context=context, timeout=60)
    try:
        connection.request("POST", path, body, {"content-type": "application/x-protobuf"})
        return connection.getresponse().status
    except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
        return "cut"
def gigabyte():
    for _ in range(1024):
        yield bytes(1 << 20)
print(ask("/v1/control/start-run", b""), ask("/v1/control/register-node", b""), ask("/v1/runtime/acquire-task", b""))
print(ask("/v1/fleet/push-object", gigabyte()))
"""


def test_the_rest_of_flower_and_a_gigabyte_are_refused(machines: Machines, open_server: None) -> None:
    (machines.folder("north") / "probe.py").write_text(PROBE)
    others, gigabyte = machines.run("north", f"{shlex.quote(sys.executable)} probe.py").splitlines()
    assert others == "404 404 404"
    assert gigabyte in ("413", "cut")
    door = (machines.folder("fed") / "server" / "door.log").read_text()
    assert "/v1/control/start-run is not for the network" in door
    assert "a request of more than" in door


def test_a_cut_network_heals(machines: Machines, open_server: None) -> None:
    """One site's cable is out for longer than a round takes; it is neither lost nor does it end the run."""
    metrics = machines.folder("fed") / "server" / "runs" / "run" / "metrics.jsonl"

    def rounds() -> list[dict[str, object]]:
        return [json.loads(line) for line in metrics.read_text().splitlines()]

    before, hub = len(rounds()), machines.space("hub")
    ip("-n", hub, "link", "set", "to-south", "down")
    try:
        time.sleep(20)
        assert len(rounds()) <= before + 1  # the round waits for it, until the deadline
    finally:
        ip("-n", hub, "link", "set", "to-south", "up")
    until("both take part again", 200, lambda: len(rounds()) >= before + 3)
    assert rounds()[-1]["participants"] == 2
    assert rounds()[-1]["lost"] == []


def test_and_the_run_went_on_unharmed(machines: Machines, open_server: None) -> None:
    metrics = machines.folder("fed") / "server" / "runs" / "run" / "metrics.jsonl"
    before = len(metrics.read_text().splitlines())
    assert before > 3  # beyond the rounds of the page
    until("two more rounds", 120, lambda: len(metrics.read_text().splitlines()) >= before + 2)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(len(lines)))
    assert all(line["rejected"] == {} for line in lines)
    assert [line["participants"] for line in lines[4:]] == [2] * len(lines[4:])  # at 3 the server did not wait for both
