"""Many small clients: a round of 100 and of 1,000, and how soon a population of 100,000 begins and what it holds.

Each federation is a process of its own, driven as ``fedlora.run`` drives it, but for the scores: everything that a run
assembles, then rounds with checkpoints of the server's state in memory. Run as ``python -m benchmarks.clients DATA
FOLDER COHORT ROUNDS``, this module is that process.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import forget_peak, peak
from benchmarks.report import ROOT, Report

LABELS = ("calm", "dull", "keen", "wary")


@dataclass(frozen=True)
class Case:
    """A population: ``clients`` of ``examples`` each, of which ``cohort`` take part in each of ``rounds``."""

    clients: int
    examples: int
    cohort: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.clients:,} clients of {self.examples}, {self.cohort:,} a round"


FULL = (Case(1_000, 4, 100, 5), Case(1_000, 4, 1_000, 2), Case(10_000, 4, 100, 5), Case(100_000, 2, 100, 10))
QUICK = (Case(100, 4, 10, 2), Case(21_000, 2, 10, 2))
"""The last is the population that is started; more than 20,000 rows are tokenised when they are needed."""


def write_data(file: Path, case: Case) -> Path:
    """Texts of 24 words on average (log-normal, 4 to 96) out of 3,000, frequent as in a language; no two are alike."""
    draw = np.random.default_rng(case.clients)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choice(syllables, 1 + k % 2)) for k in range(3_000)]
    odds = 1 / np.arange(2, len(words) + 2)
    rows, spread = case.clients * case.examples, 0.7
    lengths = draw.lognormal(math.log(24) - spread**2 / 2, spread, rows).round().clip(4, 96).astype(np.int64)
    chosen = np.split(draw.choice(len(words), lengths.sum(), p=odds / odds.sum()), lengths.cumsum()[:-1])
    with file.open("w") as out:
        for row, places in enumerate(chosen):
            text = " ".join(words[place] for place in places)
            line = {"client": f"{row // case.examples:06d}", "text": text, "label": LABELS[row % len(LABELS)]}
            out.write(json.dumps(line) + "\n")
    return file


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """One population in a process of its own; ``whole`` is how long that process took until its first round."""
    data = write_data(folder / "data.jsonl", case)
    words = [sys.executable, "-m", "benchmarks.clients", str(data), str(folder / "run")]
    begun = time.time()
    done = subprocess.run(
        [*words, str(case.cohort), str(case.rounds)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "whole": found["first_round_at"] - begun}


def run(quick: bool = False) -> Report:
    """Every population."""
    rows: list[tuple[object, ...]] = []
    details: dict[str, Any] = {}
    for case in QUICK if quick else FULL:
        with tempfile.TemporaryDirectory() as folder:
            one = details[case.name] = measure(case, Path(folder))
        print(f"{case.name}: {one}", file=sys.stderr)
        first, last = one["resident"][0], one["resident"][-1]
        rows.append(
            (
                case.name,
                one["whole"],
                one["start"],
                statistics.median(one["seconds"][1:] or one["seconds"]),
                one["client_steps"] / sum(one["seconds"]),
                one["peak"],
                f"{last - first:+.0f}",
            )
        )
    return Report(
        "clients",
        "Many small clients",
        (
            "population",
            "s to the first round, new process",
            "of it after imports",
            "s a round",
            "client-steps a second",
            "peak, MB",
            "resident MB, last round against first",
        ),
        rows,
        (
            "FedIT on MiniLM in bfloat16, rank 8 on query and value, batches of 8, one epoch, default lanes; texts of "
            "24 words on average; a client's examples are divided 70/10/20",
            "to the first round: imports, reading and dividing a JSON Lines file, the model, clients, round 0",
            "s a round: the median without the first; every checkpoint of the server is flushed as in a run",
            "peak: the whole process with libraries and model",
        ),
        {"populations": details},
    )


# -- the process that is measured


def child(data: Path, folder: Path, cohort: int, total: int) -> dict[str, Any]:
    """Assembles the run and goes through its rounds."""
    from fedlora.federation.rounds import rounds
    from fedlora.study.config import parse
    from fedlora.study.experiment import assemble

    config = {
        "model": {"name": "minilm", "task": "text-classification", "dtype": "bfloat16"},
        "data": {"train": str(data), "partition": {"by": "column", "column": "client"}},
        "algorithm": {"name": "fedit"},
        "training": {"rounds": total, "clients_per_round": cohort, "batch_size": 8, "epochs": 1},
    }
    start = time.perf_counter()
    made = assemble(parse(config, "config"), folder)
    reports = rounds(made.algorithm, made.spec, made.fleet, total=total, seed=0, sampler=made.sampler)
    next(reports)
    begun, at = time.perf_counter(), time.time()
    seconds: list[float] = []
    resident: list[float] = []
    highest = peak()
    for _ in range(total):
        before = time.perf_counter()
        report = next(reports)
        made.fleet.flush()
        report.saved()
        seconds.append(time.perf_counter() - before)
        assert len(report.folded) == cohort
        highest = max(highest, peak())
        resident.append(forget_peak() / 1e6)
    return {
        "start": begun - start,
        "first_round_at": at,
        "seconds": seconds,
        "client_steps": made.learner.steps,
        "resident": resident,
        "peak": highest / 1e6,
    }


if __name__ == "__main__":
    place, target, size, number = sys.argv[1:]
    print(json.dumps(child(Path(place), Path(target), int(size), int(number))))
