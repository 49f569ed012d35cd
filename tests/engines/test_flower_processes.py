"""Federations of real processes on the loopback: they equal the simulator, and survive what is done to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.commands import ENVIRONMENT, command, done
from study import tiny

pytestmark = pytest.mark.slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's children inherit that it is ignored
SYSTEMS = {
    "fdlora": 'name = "fdlora"\ngenerations = 1\n',
    "flexlora": 'name = "flexlora"\n',
    "pfedlora": 'name = "pfedlora"\n',
    "ce-lora": 'name = "ce-lora"\n',
}
CLIENTS = {"flexlora": "ranks = [2, 4]\n"}


def world(folder: Path, system: str = "fedit", rounds: int = 2, **sections: str) -> Path:
    """A run file of four clients on a tiny encoder, with whatever a system needs."""
    folder.mkdir()
    if system == "pfedlora":
        tiny.encoder(folder / "own")
        sections["clients"] = 'models = ["model", "own"]\n'
    elif system in CLIENTS:
        sections["clients"] = CLIENTS[system]
    file = tiny.run_file(
        folder,
        algorithm=SYSTEMS.get(system, f'name = "{system}"\n'),
        training=f"rounds = {rounds}\nbatch_size = 8\nepochs = 1\neval_every = 0\n" + sections.pop("training", ""),
        data="partition = {clients = 4}\n",
        **sections,
    )
    file.write_text(file.read_text().replace("lanes = 2", "lanes = 1"))
    return file


def adapters(run: Path) -> dict[str, bytes]:
    """Every array file of every deployed model by client, wherever it lies."""
    found: dict[str, bytes] = {}
    for about in sorted(run.rglob("fedlora.json")):
        name = json.loads(about.read_text())["client"]
        for file in sorted(about.parent.rglob("*.safetensors")):
            found[f"{name}/{file.relative_to(about.parent)}"] = file.read_bytes()
    return found


def scores(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    return {key: summary[key] for key in ("personal", "global", "bytes", "rounds", "flops", "data_hash")}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def children(pid: int) -> list[int]:
    """All descendants, in whatever session."""
    direct: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        direct.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        for child in direct.get(queue.pop(), []):
            found.append(child)
            queue.append(child)
    return found


def named(pids: list[int], *words: str) -> list[int]:
    """Those whose command line has all the words."""
    found = []
    for pid in pids:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(pid)
    return found


def until(what: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return found


class Running:
    """A federation that runs while a test interferes."""

    def __init__(self, file: Path, out: Path, *words: object) -> None:
        self.out = out
        self.log = (out.parent / f"{out.name}.log").open("w")
        self.process = subprocess.Popen(
            command("federate", file, "--sites", 2, "--out", out, *words),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )

    def round(self, number: int) -> None:
        """Waits for the end of a round."""
        until(lambda: self.ended() or ((self.out / "metrics.jsonl").exists() and len(lines(self.out)) > number))
        assert not self.ended(), self.text

    def asked(self, number: int) -> None:
        """Waits until the clients of a round have been asked."""

        def seen() -> bool:
            file = self.out / "events.jsonl"
            events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            return any(event["event"] == "asked" and event["round"] == number for event in events)

        until(lambda: self.ended() or seen())
        assert not self.ended(), self.text

    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def text(self) -> str:
        return Path(self.log.name).read_text()[-3000:]

    def kill(self, *words: str, how: int = signal.SIGKILL) -> None:
        pids = named(children(self.process.pid), *words)
        assert pids, words
        for pid in pids:
            os.kill(pid, how)

    def finish(self) -> None:
        code = self.process.wait(300)
        assert code == 0, self.text


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    """Starts federations, and ends what a failed test leaves."""
    started: list[Running] = []

    def start(file: Path, out: Path, *words: object) -> Running:
        started.append(Running(file, out, *words))
        return started[-1]

    yield start
    for one in started:
        if not one.ended():
            one.process.send_signal(signal.SIGINT)
            one.process.wait(60)
        one.log.close()


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_equals_the_simulator(system: str, tmp_path: Path) -> None:
    """Every adapter bit for bit, and every score, byte and operation that is reported."""
    file = world(tmp_path / "world", system)
    done("run", file, "--out", tmp_path / "here")
    done("federate", file, "--sites", 3, "--out", tmp_path / "there")
    here, there = adapters(tmp_path / "here"), adapters(tmp_path / "there")
    assert here.keys() == there.keys()
    assert len(here) >= 4
    assert here == there
    assert scores(tmp_path / "here") == scores(tmp_path / "there")
    text = tiny.sentence(__import__("random").Random(1), "fruit")
    said = [done("predict", tmp_path / place, "--client", "1", "--text", text) for place in ("here", "there")]
    assert said[0] == said[1]
    done("export", tmp_path / "there", "--client", "1", "--to", tmp_path / "exported")
    assert done("predict", tmp_path / "exported", "--text", text) == said[0]


# ---------------------------------------------------------------- failure is a normal input


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run file, its run folder in the simulator): FDLoRA, whose clients have memories."""
    folder = tmp_path_factory.mktemp("undisturbed")
    file = world(folder / "world", "fdlora", rounds=4)
    done("run", file, "--out", folder / "run")
    return file, folder / "run"


def equal(one: Path, other: Path) -> None:
    assert adapters(one) == adapters(other)
    assert scores(one)["personal"] == scores(other)["personal"]
    assert [line["round"] for line in lines(one)] == [0, 1, 2, 3, 4]


def test_server_killed_in_a_round(undisturbed: tuple[Path, Path], tmp_path: Path, running: Any) -> None:
    file, straight = undisturbed
    run = running(file, tmp_path / "run")
    run.asked(2)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    os.kill(status["pid"], signal.SIGKILL)
    run.finish()
    assert "the server has ended" in run.text
    equal(tmp_path / "run", straight)


def test_superlink_killed_in_a_round(undisturbed: tuple[Path, Path], tmp_path: Path, running: Any) -> None:
    """Its state is in a file: the sites come back by themselves."""
    file, straight = undisturbed
    run = running(file, tmp_path / "run")
    run.asked(2)
    run.kill("flower-superlink")
    run.finish()
    assert "the SuperLink has ended" in run.text
    equal(tmp_path / "run", straight)


def test_site_killed_in_a_round(undisturbed: tuple[Path, Path], tmp_path: Path, running: Any) -> None:
    """Everything of a site is ended; it comes back with its memories and is asked again."""
    file, straight = undisturbed
    run = running(file, tmp_path / "run")
    run.asked(2)
    everything = named(children(run.process.pid), "python")
    node = next(pid for pid in named(everything, "flower-supernode") if opened(pid, "site-2"))
    worker = next(pid for pid in named(everything, "flower.worker") if named([pid], "site-2"))
    runner = next(pid for pid in named(everything, "flower.runner") if opened(pid, "site-2"))
    for pid in (node, worker, runner):
        os.kill(pid, signal.SIGKILL)
    run.finish()
    equal(tmp_path / "run", straight)
    log = (tmp_path / "run" / "sites" / "site-2" / "logs" / "worker.log").read_text()
    assert log.count("is ready") == 2


def opened(pid: int, place: str) -> bool:
    """Whether a process writes to a file in a folder."""
    return f"/{place}/" in os.readlink(f"/proc/{pid}/fd/1")


def test_hanging_site_is_left_behind(tmp_path: Path, running: Any) -> None:
    file = world(tmp_path / "world", "fedit", rounds=3)
    run = running(file, tmp_path / "run", "--set", "engine.deadline=12")
    run.round(1)
    stopped = named(children(run.process.pid), "flower.worker", "site-2")
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    run.round(2)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    run.finish()
    assert lines(tmp_path / "run")[2]["lost"] == ["1", "3"]
    assert "left behind" in (tmp_path / "run" / "run.log").read_text()
    assert set(json.loads((tmp_path / "run" / "summary.json").read_text())["personal"]["per_client"]) >= {"0", "2"}


def test_ctrl_c_stops_everything_and_resume_goes_on(
    undisturbed: tuple[Path, Path], tmp_path: Path, running: Any
) -> None:
    file, straight = undisturbed
    run = running(file, tmp_path / "run")
    run.asked(2)
    started = children(run.process.pid)
    run.process.send_signal(signal.SIGINT)
    until(lambda: len(children(run.process.pid)) < len(started), 60)
    run.process.send_signal(signal.SIGINT)  # an impatient second one, while children are stopped
    assert run.process.wait(60) == 130
    assert "fedlora resume" in run.text
    until(lambda: not named(started, "fedlora") and not named(started, "flower"), 20)
    done("resume", tmp_path / "run")
    equal(tmp_path / "run", straight)
