"""One federation in fresh processes: what it is told (a JSON file), what it answers (a JSON line), and its memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT

INSIDE = Path(__file__).parent / "inside"
POLL, LOOKING = 0.25, 0.02
"""Seconds between two looks at the memory of all processes, and the share of one core that looking may take."""
LIMIT = 3600.0
"""Seconds after which a federation is given up."""


@dataclass(frozen=True)
class Setting:
    """How a peer computes. None leaves what the framework or the model does by itself.

    ``matmul``: the backend's ``fp32_precision`` ("none": as it is); ``workers`` processes of ``threads`` each.
    """

    attention: str | None = None
    dropout: bool = True
    matmul: str = "none"
    autocast: bool = False
    workers: int | None = None
    threads: int | None = None

    @property
    def text(self) -> str:
        """What was chosen, in words."""
        cores = "" if self.workers is None else f", {self.workers} x {self.threads} threads"
        return f"{'bfloat16 autocast' if self.autocast else 'float32'}{cores}"


@dataclass(frozen=True)
class Task:
    """A federation. ``data``: the examples of all clients in order; the first round has ``warm`` clients and only warms
    up, then come ``rounds`` of everybody."""

    shape: str
    folder: str
    data: str
    clients: int
    steps: int
    batch: int
    rounds: int
    warm: int
    classes: int
    rank: int
    alpha: int
    lr: float
    setting: Setting = Setting()


@dataclass(frozen=True)
class Run:
    """What one process tree did. ``seconds`` are those of the rounds after the first, ``start`` those until its end
    (libraries, model, data, processes); ``megabytes``: the most that all its processes held at once (shared pages
    once), None where it cannot be told."""

    seconds: Sequence[float]
    start: float
    megabytes: float | None
    details: Mapping[str, Any]


def run(words: Sequence[str | Path], task: Task, search: Sequence[Path] = ()) -> Run:
    """Starts a program with the file of its task, and waits. RuntimeError if it fails. ``search``: where it finds
    modules beside its environment's."""
    with tempfile.TemporaryDirectory() as place:
        file, out, errors = (Path(place) / name for name in ("task.json", "out", "errors"))
        file.write_text(json.dumps(asdict(task)))
        with out.open("w") as first, errors.open("w") as second:
            words, begin, env = [*map(str, words), str(file)], time.time(), environment(search)
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=first, stderr=second, env=env)
            peak = watch(process)
        lines = [line for line in out.read_text().splitlines() if line.startswith("{")]
        if process.returncode or not lines:
            last = [line for line in errors.read_text().splitlines() if line.strip()][-1:] or ["no output"]
            why = last[0].strip().replace(str(ROOT), ".")
            raise RuntimeError(f"ended with {process.returncode}: {why}")
        answer = json.loads(lines[-1])
    first, *seconds = answer.pop("seconds")
    return Run(seconds, answer.pop("ready") + first - begin, peak, answer)


def environment(search: Sequence[Path]) -> dict[str, str]:
    """Without calls to anybody's servers."""
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    quiet = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    if search:
        quiet["PYTHONPATH"] = os.pathsep.join(map(str, search))
    return {**own, **quiet}


def watch(process: subprocess.Popen[Any]) -> float | None:
    """Waits for the end; the peak of the memory of the process and its descendants, in megabytes."""
    most, end = 0, time.monotonic() + LIMIT
    while process.returncode is None:
        begin = time.process_time()
        most = max(most, sum(held(pid) for pid in family(process.pid)))
        pause = max(POLL, (time.process_time() - begin) / LOOKING)
        try:
            process.wait(pause)
        except subprocess.TimeoutExpired:
            if time.monotonic() > end:
                for pid in family(process.pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
    return most / 1e6 if most else None


def family(pid: int) -> list[int]:
    """A process and its living descendants (Linux; elsewhere the process alone)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it ended while we looked
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def held(pid: int) -> int:
    """Bytes that are resident, those shared with others in part (0: not known)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
