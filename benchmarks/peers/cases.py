"""The federations that are compared, and how each of the three ways is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.lanes import ALPHA, LABELS, LR, RANK, SHAPES, Shape, exact_onednn, texts, world
from benchmarks.peers.environments import FLOWER, PFL
from benchmarks.peers.processes import INSIDE, Run, Setting, Task, run
from benchmarks.report import ROOT
from fedlora.federation.spec import ModelSpec
from fedlora.learning.sources import minilm_folder

FEW = Shape("4 texts, 24 tokens on average, up to 128", 4, texts)
OURS, OURS_APART, FLOWER_PLAIN, FLOWER_TUNED, PFL_PLAIN, PFL_TUNED = WAYS = (
    "fedlora",
    "fedlora, a process per core",
    "Flower, as users run it",
    "Flower, tuned",
    "pfl-research, as users run it",
    "pfl-research, tuned",
)
OWN = (OURS, OURS_APART)
PEERS = {FLOWER_PLAIN: FLOWER, FLOWER_TUNED: FLOWER, PFL_PLAIN: PFL, PFL_TUNED: PFL}
TUNED = (FLOWER_TUNED, PFL_TUNED)


@dataclass(frozen=True)
class Case:
    """A federation of equal clients. ``pilot``: how many of them the search for the best setting takes; ``memory``:
    what matters is the seconds of a round and the peak of memory."""

    name: str
    shape: Shape
    clients: int
    steps: int
    rounds: int
    repeats: int
    pilot: int = 20
    ways: Sequence[str] = WAYS
    memory: bool = False

    @property
    def client_steps(self) -> int:
        """Of a round."""
        return self.clients * self.steps

    def task(self, folder: Path, spec: ModelSpec) -> Task:
        """What the processes are told; the examples are written beside it."""
        examples = world(self.shape, self.clients, self.steps, spec).examples
        data = folder / f"{self.name}.npz"
        assert examples.tokens is not None
        assert examples.offsets is not None
        np.savez(data, tokens=examples.tokens, offsets=examples.offsets, labels=examples.labels)
        return Task(
            shape=self.shape.name,
            folder=str(minilm_folder()),
            data=str(data),
            clients=self.clients,
            steps=self.steps,
            batch=self.shape.batch,
            rounds=self.rounds,
            warm=20,
            classes=len(LABELS),
            rank=RANK,
            alpha=int(ALPHA),
            lr=LR,
        )

    def lengths(self, spec: ModelSpec) -> np.ndarray:
        """Tokens of every example."""
        return np.asarray(world(self.shape, self.clients, self.steps, spec).examples.lengths)


def cases(quick: bool) -> list[Case]:
    """Shapes of batches."""
    if quick:
        return [Case(shape.name, shape, 2, 1, 1, 1, pilot=2) for shape in SHAPES]
    return [Case(shape.name, shape, 20, 5, 3, 3, pilot=10) for shape in SHAPES]


def crowds(quick: bool) -> list[Case]:
    """Many small clients."""
    if quick:
        return [Case("4 clients of 4 texts", FEW, 4, 1, 1, 1, 2, memory=True)]
    return [Case("1,000 clients of 4 texts", FEW, 1000, 1, 1, 1, 100, memory=True)]


def start(way: str, task: Task) -> Run:
    """Runs one federation in one way."""
    if way in OWN:
        return run([sys.executable, "-m", "benchmarks.peers.ours"], task, search=(ROOT, ROOT / "src"))
    python, workers = PEERS[way].ready(), task.setting.workers or 1
    if PEERS[way] is FLOWER:
        return run([python, INSIDE / "flower_peer.py"], task)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] if workers > 1 else []
    return run([python, *launch, INSIDE / "pfl_peer.py"], task)


def cores_here() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plain(way: str) -> Setting:
    """What a way computes with where nothing is tuned."""
    return Setting(workers=cores_here(), threads=1) if way == OURS_APART else Setting()


def candidates(quick: bool) -> list[Setting]:
    """What tuning tries: eager attention and no dropout always, the faster float32 products where they are exact."""
    cores = cores_here()
    base = Setting("eager", dropout=False, matmul=exact_onednn())
    found = [
        replace(base, autocast=cast, workers=workers, threads=threads)
        for cast in (False, True)
        for workers, threads in dict.fromkeys([(1, cores), (cores, 1)])
    ]
    return found[:: len(found) - 1] if quick and len(found) > 1 else found
