"""A federation in fedlora: ``python -m benchmarks.peers.ours TASK.json`` prints a line of JSON, as the peers' programs
do. It is an ordinary run on text files, everything "auto"; one worker is the simulator, several are Ray's actors.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from benchmarks.lanes import HEAD_LR, LABELS, SEED
from benchmarks.peers.processes import Setting, Task
from fedlora.federation.rounds import rounds
from fedlora.federation.sampling import cohort
from fedlora.federation.spec import Client
from fedlora.study.config import RunConfig, parse
from fedlora.study.host import Host
from fedlora.study.run import hosted

SPECIAL = 2
"""Tokens that the tokenizer adds to a text."""


def texts(task: Task) -> Iterator[dict[str, Any]]:
    """The task's examples as rows: texts of so many tokens, by client in equal shares."""
    words = sorted(w for w in AutoTokenizer.from_pretrained(task.folder).get_vocab() if w.isascii() and w.isalpha())
    with np.load(task.data) as stored:
        offsets, tokens, labels = stored["offsets"], stored["tokens"], stored["labels"]
    for row, label in enumerate(labels):
        own = tokens[offsets[row] : offsets[row + 1] - SPECIAL]
        text = " ".join(words[token % len(words)] for token in own)
        yield {"text": text, "label": LABELS[label], "client": f"{row // (task.batch * task.steps):04d}"}


def files(task: Task, place: Path) -> dict[str, str]:
    """Training rows, and a row of each client to score, which nobody does here."""
    rows = list(texts(task))
    own = len(rows) // task.clients
    unused = [{**row, "text": f"{part} {row['client']}"} for part in ("validation", "test") for row in rows[::own]]
    parts = {"train": rows, "validation": unused[: task.clients], "test": unused[task.clients :]}
    for name, some in parts.items():
        pq.write_table(pa.Table.from_pylist(some), place / f"{name}.parquet")
    return {name: str(place / f"{name}.parquet") for name in parts}


def configuration(task: Task, place: Path) -> RunConfig:
    """The run file of the task."""
    workers = task.setting.workers or 1
    engine = {"name": "ray", "actors": workers, "threads": task.setting.threads or 1} if workers > 1 else {}
    return parse(
        {
            "model": {"name": "minilm", "task": "text-classification"},
            "data": {**files(task, place), "partition": {"column": "client"}, "labels": list(LABELS)},
            "adapter": {"rank": task.rank, "alpha": float(task.alpha)},
            "algorithm": {"name": "fedit"},
            "training": {
                "rounds": task.rounds + 1,
                "steps": task.steps,
                "batch_size": task.batch,
                "lr": task.lr,
                "head_lr": HEAD_LR,
            },
            "engine": engine,
            "seed": SEED,
        },
        "the benchmark",
    )


def timed(task: Task, host: Host) -> list[float]:
    """Seconds of every round, the first with a small cohort."""

    def sampler(clients: Sequence[Client], round: int, seed: int) -> Sequence[Client]:
        return cohort(clients, round, seed, min(task.warm, task.clients) if round == 1 else None)

    total = task.rounds + 1
    reports = rounds(host.algorithm, host.spec, host.fleet, total=total, seed=SEED, sampler=sampler, shard=host.shard)
    moments = []
    for report in reports:
        assert not report.lost
        assert not report.rejected
        moments.append(time.perf_counter())
    steps, _ = host.spent()
    assert steps == task.steps * (min(task.warm, task.clients) + task.rounds * task.clients)
    return [end - begin for begin, end in pairwise(moments)]


def main() -> None:
    """Loads, chooses the type as a run does, and times the rounds."""
    told = json.loads(Path(sys.argv[1]).read_text())
    task = Task(**{**told, "setting": Setting(**told["setting"])})
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        config = configuration(task, place)
        (place / "run").mkdir()
        (place / "run" / "run.log").touch()  # actors take it for a shared folder
        with hosted(config, place / "run") as host:
            start = host.algorithm.server_init(host.spec, SEED)["merged"]
            count = sum(value.numel() for name, value in start.items() if not name.endswith("/scale"))
            ready = time.time()
            seconds = timed(task, host)
            resolved = host.config
    chosen = {"type": resolved.model.dtype, "lanes": resolved.engine.lanes, "shard": resolved.engine.shard}
    print(json.dumps({"seconds": seconds, "ready": ready, "trained": count, **chosen}))


if __name__ == "__main__":
    main()
