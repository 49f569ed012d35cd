"""Whole runs on Ray, every actor with a base: they equal the simulator bit for bit, also where actors are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install fedlora[ray]")

from ray.cluster_utils import Cluster  # noqa: E402

from engines.commands import ENVIRONMENT, command, done  # noqa: E402
from fedlora.engines.ray.host import WAIT  # noqa: E402
from fedlora.engines.ray.worker import Start, Worker  # noqa: E402
from fedlora.errors import UserError  # noqa: E402
from fedlora.sites import agreement  # noqa: E402
from fedlora.study.config import load  # noqa: E402
from fedlora.study.experiment import assemble  # noqa: E402
from fedlora.study.run import resume, run  # noqa: E402
from study import tiny  # noqa: E402

SHORT = "rounds = 2\nbatch_size = 8\nepochs = 1\n"
SYSTEMS: dict[str, dict[str, Any]] = {
    "fedit": {"training": {"eval_everyone": True}},
    "fedit, two lanes": {"engine": {"lanes": 2}},
    "flexlora": {"clients": {"ranks": [2, 4]}},
    "fdlora": {"algorithm": {"generations": 1}},
    "ce-lora": {},
}
DEADLY = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from fedlora.algorithms.fdlora import FDLoRA

@dataclass(frozen=True)
class Deadly(FDLoRA):
    '''Ends its own process once, in the middle of a shard.'''
    once: str = ""

    def client_update(self, payload, memory, local):
        if (local.round, local.client.id) == (2, "3") and not Path(self.once).exists():
            Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return (yield from super().client_update(payload, memory, local))
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def world(folder: Path, training: str = SHORT) -> Path:
    """Five clients in shards of two."""
    file = tiny.run_file(folder, training=training, data="partition = {clients = 5}\n")
    file.write_text(file.read_text().replace("lanes = 2", "lanes = 1\nshard = 2\nactors = 2"))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of arrays: adapters, clients' memories, checkpoints."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def told(folder: Path) -> Any:
    """What the metrics and the summary say, but for the time it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    said = [*lines, json.loads((folder / "summary.json").read_text())]
    return [{key: value for key, value in one.items() if "second" not in key} for one in said]


def equal(one: Path, other: Path) -> None:
    assert contents(one).keys() == contents(other).keys()
    assert contents(one) == contents(other)
    assert told(one) == told(other)


@pytest.mark.slow
@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_equals_the_simulator(system: str, connection: None, tmp_path: Path) -> None:
    """Adapters, memories and checkpoints bit for bit; every score, byte and operation that is reported."""
    sections = {**SYSTEMS[system]}
    sections["algorithm"] = {"name": system.split(",")[0], **sections.get("algorithm", {})}
    config = load(world(tmp_path)).replace(**sections)
    here = run(config, out=tmp_path / "here").folder
    there = run(config, out=tmp_path / "there", engine={"name": "ray"}).folder
    assert len([name for name in contents(there) if "adapters/clients/" in name]) >= 5
    equal(here, there)
    on_everyone = [json.loads((place / "summary.json").read_text())["personal"] for place in (here, there)]
    assert ("on_everyone" in on_everyone[1]) == (system == "fedit")


@pytest.mark.slow
def test_an_actor_that_ends_in_the_middle_of_a_shard(connection: None, tmp_path: Path) -> None:
    """Client 2 has trained and stored its memory when client 3 ends the actor: both are done again by another."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    file = world(tmp_path)
    (tmp_path / "happened").touch()
    algorithm = {"name": f"{tmp_path / 'deadly.py'}:Deadly", "generations": 1, "once": str(tmp_path / "happened")}
    config = load(file).replace(algorithm=algorithm)
    here = run(config, out=tmp_path / "here").folder
    (tmp_path / "happened").unlink()
    there = run(config, out=tmp_path / "there", engine={"name": "ray"}).folder
    assert (tmp_path / "happened").exists()
    log = (there / "run.log").read_text()
    assert re.search(r"actor \d \(pid \d+ on .+\) is lost: round 2 \(train\) of 2, 3 is given to another", log)
    equal(here, there)
    finished = resume(there, rounds=3).folder  # and longer, with fresh actors and the same shards
    equal(resume(here, rounds=3).folder, finished)


@pytest.mark.slow
def test_objects_instead_of_names(connection: None, tmp_path: Path) -> None:
    """What Python gave the run goes to the actors with it; by default there are as many actors as cores."""
    rows = [json.loads(line) for line in tiny.reviews(tmp_path / "x.jsonl", 80).read_text().splitlines()]
    clients = {name: datasets.Dataset.from_list(rows[i::2]) for i, name in enumerate(("north", "south"))}
    config = {
        "model": {"name": "mine", "task": "text-classification", "dtype": "float32"},
        "data": {"text": "text", "label": "label"},
        "algorithm": {"name": "fedit"},
        "training": {"rounds": 1},
        "engine": {"lanes": 1, "shard": 1},
    }
    folder = tiny.encoder(tmp_path / "model")
    for name in ("simulator", "ray"):
        model = transformers.AutoModel.from_pretrained(folder)
        model.processor = tiny.tokenizer()
        given = {**config, "engine": {**config["engine"], "name": name}}
        run(given, model=model, clients=clients, out=tmp_path / name)
    equal(tmp_path / "simulator", tmp_path / "ray")
    assert len(pids(tmp_path / "ray")) >= 1


# ---------------------------------------------------------------- processes of the command line


def until(what: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 180.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


def rounds(folder: Path) -> int:
    """How many lines the metrics have, that of round 0 among them."""
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def pids(folder: Path) -> list[str]:
    """The actors that were ever ready."""
    file = folder / "run.log"
    return re.findall(r"actor \d+ \(pid (\d+) on .+\) is ready", file.read_text()) if file.exists() else []


@pytest.mark.slow
def test_kill_an_actor_then_the_head_then_resume(tmp_path: Path) -> None:
    """From outside, mid-round, with SIGKILL; the private Ray ends with the head."""
    file = world(tmp_path, "rounds = 5\nbatch_size = 8\nsteps = 60\neval_every = 0\n")
    done("run", file, "--out", tmp_path / "here")
    there = tmp_path / "there"
    with (tmp_path / "output").open("wb") as output:
        words = command("run", file, "--set", "engine.name=ray", "--out", there)
        head = subprocess.Popen(words, env=ENVIRONMENT, stdout=output, stderr=output)
        try:
            actors = until(lambda: pids(there), head)
            until(lambda: rounds(there) > 1, head)  # the lines of rounds 0 and 1
            os.kill(int(actors[0]), signal.SIGKILL)
            until(lambda: rounds(there) > 3, head)
            others = {*pids(there)} - {actors[0]}
        finally:
            head.kill()
            assert head.wait(60) == -signal.SIGKILL, (tmp_path / "output").read_text()[-3000:]
    assert "round 2 (train) of" in (there / "run.log").read_text()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in others):
        assert time.monotonic() < end, f"actors outlive the head: {others}"
        time.sleep(0.1)
    done("resume", there)
    equal(tmp_path / "here", there)
    text = "the plum near some axe"
    assert done("predict", there, "--client", "1", "--text", text) == done(
        "predict", tmp_path / "here", "--client", "1", "--text", text
    )
    done("export", there, "--client", "1", "--to", tmp_path / "exported")
    assert (tmp_path / "exported" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_cluster_that_is_there_loses_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes with room for one actor each: when one has gone, the other goes on alone. The cluster stays."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # an earlier ray.init has given this process a token of its own
    file = world(tmp_path, "rounds = 4\nbatch_size = 8\nsteps = 60\neval_every = 0\n")
    done("run", file, "--out", tmp_path / "here")
    there = tmp_path / "there"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        words = ("--set", "engine.name=ray", "--set", f"engine.address={cluster.address}", "--out", there)
        with (tmp_path / "output").open("wb") as output:
            head = subprocess.Popen(
                command("run", file, *words),
                env={**ENVIRONMENT, "RAY_AUTH_MODE": "disabled"},
                stdout=output,
                stderr=output,
            )
            try:
                until(lambda: len(pids(there)) == 2, head)
                until(lambda: rounds(there) > 1, head)
                cluster.remove_node(second, allow_graceful=False)
                assert head.wait(300) == 0, (tmp_path / "output").read_text()[-3000:]
            finally:
                head.kill()
                head.wait(60)
        assert cluster.head_node.any_processes_alive()
    finally:
        cluster.shutdown()
    assert re.search(r"actor \d \(pid \d+ on .+\) is lost: round \d \(train\) of", (there / "run.log").read_text())
    assert len(pids(there)) == 2
    equal(tmp_path / "here", there)


# ---------------------------------------------------------------- what is refused


def test_without_ray_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("fedlora.engines.ray")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed\n  -> pip install fedlora\[ray\]"):
        run(load(world(tmp_path), ["engine.name=ray"]), out=tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_no_cluster_where_the_run_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the slow tests' connection would be used as it is
    config = load(world(tmp_path), ["engine.name=ray", "engine.address=127.0.0.1:9"])
    with pytest.raises(UserError, match=r"\[engine\] address = '127.0.0.1:9'(.|\n)*ray start --head"):
        run(config, out=tmp_path / "there")


def test_what_is_no_cluster_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something listens there, but it is not Ray: one attempt takes 40 s, and by default there would be twenty."""
    attempts: list[str | None] = []

    def init(address: str, **options: Any) -> None:
        attempts.append(os.environ.get(WAIT))
        raise ConnectionError(f"Failed to connect to Ray cluster at {address}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = load(world(tmp_path), ["engine.name=ray", f"engine.address=127.0.0.1:{port}"])
        with pytest.raises(UserError, match=rf"\[engine\] address = '127.0.0.1:{port}': Failed to connect"):
            run(config, out=tmp_path / "there")
    assert attempts == ["1"]
    assert WAIT not in os.environ  # a private Ray would wait no longer for its own


def test_an_actor_refuses_what_is_not_the_same(tmp_path: Path) -> None:
    """Another node's folder, data or model: named, with a remedy, before anything is trained."""
    folder = tmp_path / "run"
    folder.mkdir()
    experiment = assemble(load(world(tmp_path)), folder)
    plain, facts = experiment.config.model_dump(by_alias=True), agreement.facts_of(experiment)
    start = Start(plain, str(folder), {}, facts, experiment.population.digest)
    with pytest.raises(UserError, match=r"there is no run folder(.|\n)*shared file system"):
        Worker().load(start)
    (folder / "run.log").touch()
    assert Worker().load(start).startswith(f"pid {os.getpid()} on")
    with pytest.raises(UserError, match="the data or its split differ"):
        Worker().load(replace(start, data="other"))
    with pytest.raises(UserError, match="base: the server has sha256:0, this site sha256:"):
        Worker().load(replace(start, facts={**facts, "base": "sha256:0"}))
