"""The tables of a study: what each run measured, means with t-intervals over seeds, differences paired by seed."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scipy import stats

from fedlora.study import folder as files

LEVEL = 0.95


@dataclass(frozen=True)
class Point:
    """One evaluation on the way: scores of the deployed variant, bytes sent until then, the other variants' scores."""

    round: int
    validation: float | None
    mean: float | None
    std: float | None
    worst_decile: float | None
    overall: float | None
    megabytes: float
    variants: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Measured:
    """A finished run. Scores are those of the best round by validation, but ``unseen``, which is of the last; bytes,
    seconds and FLOPs of all rounds, without what a client spends on deploying (local fine-tuning, fusion)."""

    cell: str
    seed: int
    metric: str
    higher_is_better: bool
    data_hash: str
    class_prior: float | None
    curve: tuple[Point, ...]
    unseen: float | None
    up: float
    down: float
    seconds: float
    flops: float | None

    @property
    def best(self) -> Point:
        """The evaluation with the best validation score, the earliest of equals; the last without validation."""
        known = [point for point in self.curve if point.validation is not None]
        if not known:
            return self.curve[-1]
        sign = 1 if self.higher_is_better else -1
        return max(known, key=lambda point: sign * (point.validation or 0.0))

    @property
    def validation(self) -> float | None:
        """The best validation score."""
        return self.best.validation

    def reached(self, target: float) -> Point | None:
        """The first evaluation at which the personalised score is at least as good as the target."""
        sign = 1 if self.higher_is_better else -1
        return next((p for p in self.curve if p.mean is not None and sign * p.mean >= sign * target), None)

    @property
    def line(self) -> str:
        """For a terminal."""
        score = "-" if self.best.mean is None else f"{self.best.mean:.4f}"
        return f"{self.metric} {score} at round {self.best.round}, {self.seconds:.0f} s"


def measured(folder: Path, cell: str, seed: int) -> Measured:
    """Reads a finished run folder."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    lines = list(files.lines(folder / "metrics.jsonl"))
    sent, curve = 0.0, []
    for line in lines:
        sent += sum(line["bytes"].values()) / 1e6
        if "personal" in line:
            curve.append(_point(line["round"], line["personal"], line["global"], line.get("validation"), sent))
    overall = summary["global"]
    last = _point(
        summary["rounds"],
        summary["personal"],
        None if overall is None else overall["score"],
        summary.get("validation"),
        sent,
    )
    unseen = (summary["unseen"] or {}).get("zero-shot") or {}
    totals = summary["bytes"]
    return Measured(
        cell,
        seed,
        summary["metric"],
        summary["higher_is_better"],
        summary["data_hash"],
        (summary.get("class_prior") or {}).get("mean"),
        (*curve, last),
        unseen.get("score"),
        (totals["up"] + totals["setup_up"]) / 1e6,
        (totals["down"] + totals["setup_down"]) / 1e6,
        summary["seconds"],
        summary.get("flops"),
    )


def _point(
    round: int, personal: Mapping[str, Any], overall: float | None, validation: Mapping[str, Any] | None, sent: float
) -> Point:
    return Point(
        round,
        None if validation is None else validation["mean"],
        personal["mean"],
        personal["std"],
        personal["worst_decile"],
        overall,
        sent,
        personal["variants"],
    )


# -- over seeds


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % t-interval; nan for the width of a single value.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)      # t(0.975, 2) / sqrt(3) = 4.303 / 1.732
    (2.0, 2.484)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, half


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> tuple[float, float] | None:
    """The interval of the differences seed by seed; None without a common seed.

    >>> paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0, 2: 9.0})
    (1.0, 0.0)
    """
    common = sorted(values.keys() & reference.keys())
    return interval([values[seed] - reference[seed] for seed in common]) if common else None


@dataclass(frozen=True)
class Row:
    """A line of the table: a cell's deployed model with everything that was measured, or another variant of it."""

    cell: str
    variant: str
    columns: Mapping[str, tuple[float, float] | None]


COLUMNS: Mapping[str, str] = {
    "personal": "personal",
    "difference": "against the first",
    "std": "std over clients",
    "worst_decile": "worst tenth",
    "global": "global",
    "unseen": "unseen",
    "best_round": "best round",
    "mb_up": "MB up",
    "mb_down": "MB down",
    "rounds_to_target": "rounds to target",
    "mb_to_target": "MB to target",
    "client_seconds": "client-seconds",
    "flops": "FLOPs",
}
"""Column of table.csv -> heading of table.md."""


def rows_of(runs: Sequence[Measured], cells: Sequence[str], target: float | None) -> list[Row]:
    """Every cell's deployed variant, then its others; differences are from the first cell's deployed one."""
    by_cell = {cell: {run.seed: run for run in runs if run.cell == cell} for cell in cells}
    reference = {seed: run.best.mean for seed, run in by_cell[cells[0]].items() if run.best.mean is not None}
    rows: list[Row] = []
    for cell, by_seed in by_cell.items():
        names = list(dict.fromkeys(name for run in by_seed.values() for name in run.best.variants))
        for position, variant in enumerate(names or ["deployed"]):
            scores = {seed: run.best.variants.get(variant, {}).get("mean") for seed, run in by_seed.items()}
            known = {seed: value for seed, value in scores.items() if value is not None}
            columns: dict[str, tuple[float, float] | None] = {
                "personal": interval(list(known.values())) if known else None,
                "difference": None if cell == cells[0] and not position else paired(known, reference),
            }
            for key in ("std", "worst_decile"):
                columns[key] = _over([run.best.variants.get(variant, {}).get(key) for run in by_seed.values()])
            if not position:
                columns |= {key: _over(values) for key, values in _whole(list(by_seed.values()), target).items()}
            rows.append(Row(cell, variant if names else "", columns))
    return rows


def _whole(runs: Sequence[Measured], target: float | None) -> dict[str, list[float | None]]:
    """What is measured once a run, not once a variant."""
    reached = [None if target is None else run.reached(target) for run in runs]
    return {
        "global": [run.best.overall for run in runs],
        "unseen": [run.unseen for run in runs],
        "best_round": [float(run.best.round) for run in runs],
        "mb_up": [run.up for run in runs],
        "mb_down": [run.down for run in runs],
        "rounds_to_target": [None if point is None else float(point.round) for point in reached],
        "mb_to_target": [None if point is None else point.megabytes for point in reached],
        "client_seconds": [run.seconds for run in runs],
        "flops": [run.flops for run in runs],
    }


def _over(values: Sequence[float | None]) -> tuple[float, float] | None:
    """The interval; None unless every seed has a value: a mean over those that got there would flatter."""
    known = [value for value in values if value is not None]
    return interval(known) if known and len(known) == len(values) else None


def common_target(runs: Sequence[Measured]) -> float | None:
    """The worst of the cells' best scores: every run that has one reached it; None where none has."""
    scores = [run.best.mean for run in runs if run.best.mean is not None]
    return (min(scores) if runs[0].higher_is_better else max(scores)) if scores else None


def write_tables(
    folder: Path, runs: Sequence[Measured], cells: Sequence[str], target: float | None, tuned: Mapping[str, str]
) -> None:
    """``table.csv`` (means and half widths), ``table.md`` (for people), ``runs.csv`` (one line a run)."""
    goal = common_target(runs) if target is None else target
    rows = rows_of(runs, cells, goal)
    header = ["cell", "variant", *(name for key in COLUMNS for name in (key, f"{key}_halfwidth"))]
    table = [
        [row.cell, row.variant, *(part for key in COLUMNS for part in (row.columns.get(key) or ("", "")))]
        for row in rows
    ]
    _csv(folder / "table.csv", header, table)
    plain = ["cell", "seed", "up", "down", "seconds", "flops", "unseen", "data_hash"]
    assert set(plain) <= {f.name for f in fields(Measured)}
    own = ["round", "validation", "mean", "std", "worst_decile", "overall"]
    lines = [[*(getattr(run, name) for name in plain), *(getattr(run.best, name) for name in own)] for run in runs]
    _csv(folder / "runs.csv", [*plain, *(f"best_{name}" for name in own)], lines)
    files.replace(folder / "table.md", _markdown(rows, runs, goal, target is None, tuned))


def _markdown(
    rows: Sequence[Row], runs: Sequence[Measured], target: float | None, common: bool, tuned: Mapping[str, str]
) -> str:
    shown = {key: name for key, name in COLUMNS.items() if any(row.columns.get(key) for row in rows)}
    seeds = sorted({run.seed for run in runs})
    metric, better = runs[0].metric, "higher" if runs[0].higher_is_better else "lower"
    why = " (the least of all runs' best: every run that has a score reached it)" if common else ""
    goal = "no run has a score" if target is None else f"{target:.4f}{why}"
    prior = _over([run.class_prior for run in {run.seed: run for run in runs}.values()])
    choice = "; ".join(f"{cell}: {setting}" for cell, setting in tuned.items())
    validated = any(run.validation is not None for run in runs)
    when = "the best round by validation" if validated else "the end (no validation rows were kept)"
    last = ", unseen clients after the last" if validated and shown.get("unseen") else ""
    out = [
        f"{metric} ({better} is better), seeds {', '.join(map(str, seeds))}; mean ± half the 95 % t-interval over "
        f"seeds; differences are paired by seed; scores are on test rows at {when}{last}.",
        f"Target: {goal}. Client-seconds: computing time of all clients in the simulation. These and FLOPs "
        "are of the rounds: what deploying takes after them (local fine-tuning, fusion) is apart.",
        *([f"Class prior (each client's most frequent label): {_cell(prior, 'personal')}."] if prior else []),
        *([f"Chosen by validation on seed {seeds[0]}: {choice}"] if choice else []),
        "",
        "| | " + " | ".join(shown.values()) + " |",
        "|---|" + "---:|" * len(shown),
    ]
    for row in rows:
        variant = (
            "" if row.columns.get("mb_up") is not None and row.variant in ("", "personal") else f" · {row.variant}"
        )
        cells = (_cell(row.columns.get(key), key) for key in shown)
        out.append(f"| {row.cell}{variant} | " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def _cell(value: tuple[float, float] | None, key: str) -> str:
    """Mean ± half width, with the digits that the column deserves."""
    if value is None:
        return "-"
    mean, half = value
    scores = ("personal", "difference", "std", "worst_decile", "global", "unseen")
    form = ".4f" if key in scores else (".3g" if key == "flops" else ".2f" if key.startswith("mb") else ".1f")
    sign = "+" if key == "difference" else ""
    return f"{mean:{sign}{form}}" + ("" if math.isnan(half) or half == 0 else f" ± {half:{form}}")


def _csv(path: Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
    temporary.replace(path)
