"""kill -9 at any moment, then resume: the same adapters bit for bit and the same scores as a run left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from study import tiny

# The child kills itself (SIGKILL: nothing is cleaned up) at the n-th call of one function of fedlora.
CHILD = """
import importlib, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's children inherit that it is ignored
place, name, call, *words = sys.argv[1:]
module = importlib.import_module(place)
original, left = getattr(module, name), [int(call)]
def killed(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(module, name, killed)
from fedlora.cli import main
sys.argv = ["fedlora", *words]
main()
"""
MOMENTS = {
    "in the middle of a round": ("fedlora.federation.client", "numbered", 9),
    "while a checkpoint is written": ("fedlora.federation.checkpoint", "_tidy", 3),
    "between a checkpoint's file and its manifest": ("fedlora.federation.checkpoint", "sync", 5),
    "with clients ahead of the server": ("fedlora.federation.checkpoint", "save", 4),
    "after the last round": ("fedlora.study.run", "write_global", 1),
}
ALGORITHMS = ("fedit", "fdlora", "flexlora")


def child(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)


def killed(moment: str, file: Path, out: Path, algorithm: str) -> None:
    done = child("-c", CHILD, *MOMENTS[moment], "run", file, "--set", f"algorithm.name={algorithm}", "--out", out)
    assert done.returncode == -signal.SIGKILL, done.stderr


def results(run: Path) -> dict[str, Any]:
    """Every file of every adapter, the scores, and which rounds the metrics tell of."""
    summary = json.loads((run / "summary.json").read_text())
    adapters = {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted((run / "adapters").rglob("*.safetensors"))
    }
    rounds = [json.loads(line)["round"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("personal", "global", "bytes", "data_hash", "rounds")
    return {"adapters": adapters, "rounds": rounds, **{key: summary[key] for key in keys}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("killed")
    file = tiny.run_file(
        folder,
        training="rounds = 4\nbatch_size = 8\nclients_per_round = 3\n",
        data="partition = {clients = 5}\n",
        output="client_adapters = 2\n",
    )
    return folder, file


@pytest.fixture(scope="module")
def straight(world: tuple[Path, Path]) -> dict[str, dict[str, Any]]:
    """The runs that nobody disturbs, by algorithm, in one process."""
    folder, file = world
    code = (
        "import fedlora, sys\n"
        "from fedlora.study.config import load\n"
        "for name in sys.argv[3:]:\n"
        "    fedlora.run(load(sys.argv[1], [f'algorithm.name={name}']), out=f'{sys.argv[2]}/straight-{name}')\n"
    )
    done = child("-c", code, file, folder, *ALGORITHMS)
    assert done.returncode == 0, done.stderr
    return {name: results(folder / f"straight-{name}") for name in ALGORITHMS}


@pytest.mark.parametrize(
    ("moment", "algorithm"),
    [
        pytest.param(moment, name, marks=() if i % len(ALGORITHMS) == j else pytest.mark.slow)
        for i, moment in enumerate(MOMENTS)
        for j, name in enumerate(ALGORITHMS)
    ],
)
def test_killed_and_resumed_equals_the_straight_run(
    world: tuple[Path, Path], straight: dict[str, dict[str, Any]], moment: str, algorithm: str
) -> None:
    folder, file = world
    out = folder / f"{algorithm}-{moment.replace(' ', '-')}"
    killed(moment, file, out, algorithm)
    assert not (out / "summary.json").exists()
    done = child("-m", "fedlora.cli", "resume", out)
    assert done.returncode == 0, done.stderr
    assert results(out) == straight[algorithm]


def test_killed_twice_even_while_resuming(world: tuple[Path, Path], straight: dict[str, dict[str, Any]]) -> None:
    folder, file = world
    out = folder / "twice"
    killed("with clients ahead of the server", file, out, "fdlora")
    done = child("-c", CHILD, "fedlora.federation.checkpoint", "save", 2, "resume", out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert child("-m", "fedlora.cli", "resume", out).returncode == 0
    assert results(out) == straight["fdlora"]


def test_ctrl_c_says_how_to_go_on(world: tuple[Path, Path], straight: dict[str, dict[str, Any]]) -> None:
    folder, file = world
    out = folder / "interrupted"
    code = CHILD.replace("signal.SIGKILL", "signal.SIGINT")
    done = child("-c", code, "fedlora.federation.client", "numbered", 9, "run", file, "--out", out)
    assert done.returncode == 130, done.stderr
    assert f"fedlora resume {out}" in done.stderr
    assert "Traceback" not in done.stderr
    assert child("-m", "fedlora.cli", "resume", out).returncode == 0
    assert results(out) == straight["fedit"]


def test_one_process_at_a_time(world: tuple[Path, Path]) -> None:
    from fedlora.errors import UserError
    from fedlora.study import folder as files

    folder, _ = world
    with files.owned(folder), pytest.raises(UserError, match="another process"), files.owned(folder):
        pass
