"""What travels: CE-LoRA's r x r cores against FedIT's factors, with the statistics that CE-LoRA sends once.

Every number is a counter of a run: frames as they would travel, headers included. How long a client trains does not
change them, so it trains for one step.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.memory import write_data
from benchmarks.report import Report

CLIENTS, ROUNDS = 20, 2
RANKS = (4, 8, 16)


def run(quick: bool = False) -> Report:
    """A client's bytes up a round at several ranks, and the round after which the statistics are paid back."""
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as place:
        data = write_data(Path(place) / "data.jsonl", CLIENTS)
        for rank in RANKS[:1] if quick else RANKS:
            fedit = counted(Path(place), data, rank, {"name": "fedit"})
            for project in (32, None):
                ce = counted(Path(place), data, rank, {"name": "ce-lora", "project": project})
                saved = fedit["up"] - ce["up"]
                paid = math.ceil(ce["setup"] / saved)
                shown = "all 384 dimensions" if project is None else f"{project} dimensions"
                ratio, what = fedit["up"] / ce["up"], f"r = {rank}, statistics in {shown}"
                rows.append((what, fedit["up"], ce["up"], ratio, ce["ideal"], ce["setup"], paid))
    return Report(
        "communication",
        "Bytes up, by client",
        (
            "MiniLM, query and value",
            "FedIT, a round",
            "CE-LoRA, a round",
            "ratio",
            "of which r x r numbers",
            "CE-LoRA's statistics, once",
            "paid back in round",
        ),
        rows,
        (
            f"means over {CLIENTS} clients of 16 training examples in 4 classes: one mixture component a class "
            "(three from 30 examples a class on); heads stay home for both",
            "down: the same a round; CE-LoRA's statistics go up only",
        ),
    )


def counted(place: Path, data: Path, rank: int, algorithm: dict[str, Any]) -> dict[str, float]:
    """Bytes up by client: a round, once at introduction, and what r x r float32 numbers at every site come to."""
    import fedlora

    config = {
        "model": {"name": "minilm", "task": "text-classification", "dtype": "float32"},
        "adapter": {"rank": rank, "extras": {"head": "private"}},
        "data": {
            "train": str(data),
            "text": "text",
            "label": "label",
            "max_length": 16,
            "partition": {"by": "column", "column": "client"},
        },
        "algorithm": algorithm,
        "training": {"rounds": ROUNDS, "steps": 1, "batch_size": 2, "eval_every": 0, "eval_clients": 1},
        "output": {"client_adapters": "none"},
    }
    name = f"{algorithm['name']}-{algorithm.get('project')}-{rank}"
    sent = fedlora.run(config, out=place / name).summary["bytes"]
    sites = 12  # query and value of six layers
    return {
        "up": sent["up"] / CLIENTS / ROUNDS,
        "setup": sent["setup_up"] / CLIENTS,
        "ideal": 4.0 * rank * rank * sites,
    }
