"""The quickstart over three seeds: mean and spread of every row, as in the README.

python benchmarks/quickstart.py [--task causal-lm] [--seeds 0 1 2] [--out runs/quickstart-seeds]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from fedlora.demos import DEMOS
from fedlora.demos.demo import show

COLUMNS = ("mean", "std", "worst_decile", "everyone")


def table(runs: list[list[dict[str, float | None]]], unit: str) -> str:
    """Markdown: each row's columns over the seeds, mean ± standard deviation of the seeds."""
    lines = [f"| | {unit} | spread over clients | worst tenth | everyone's | sent |", "|---|---|---|---|---|---|"]
    for rows in zip(*runs, strict=True):
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in rows if row[column] is not None]
            known = f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else "-"
            cells.append(known)
        sent = statistics.fmean(row["sent"] or 0 for row in rows)
        lines.append(f"| {rows[0]['name']} | {' | '.join(cells)} | {f'{sent / 1e6:.1f} MB' if sent else '-'} |")
    return "\n".join(lines)


def processor_seconds() -> float:
    """Of all threads of this process: load by others changes them less than seconds."""
    now = os.times()
    return now.user + now.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=list(DEMOS), default="causal-lm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart-seeds"))
    options = parser.parse_args()
    runs, seconds, computing = [], [], []
    for seed in options.seeds:
        start, used = time.perf_counter(), processor_seconds()
        show(DEMOS[options.task], options.out / str(seed), seed=seed)
        seconds.append(time.perf_counter() - start)
        computing.append(processor_seconds() - used)
        runs.append(json.loads((options.out / str(seed) / "table.json").read_text())["rows"])
    text = table(runs, DEMOS[options.task].unit) + f"\n\nseeds {options.seeds}, seconds {[round(s) for s in seconds]}"
    text += f", of processors {[round(s) for s in computing]} ({torch.get_num_threads()} threads)\n"
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"quickstart-{options.task}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
