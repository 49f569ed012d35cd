"""What CE-LoRA's uploads say of a client's texts, beside FedIT's: gradients of cores, and mixtures of features.

python studies/ce-lora-privacy/reconstruct.py --data studies/data/medquad.parquet --out studies/ce-lora-privacy

Writes runs.csv (every trial) and table.md (means, 95 % t-intervals over trials) into the folder ``out``. The attacks
are in attacks.py and mixtures.py.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from attacks import LENGTH, guesses, matching, recognition, span_check
from mixtures import mixtures
from scipy import stats
from target import Case, Target, cut, observed
from torch import Tensor

from fedlora.federation.client import Job
from fedlora.federation.orders import Fit, Model
from fedlora.federation.spec import Tree, derive
from fedlora.learning.loading import load_backbone
from fedlora.study.config import load
from fedlora.study.experiment import Experiment, assemble

BASE = Path(__file__).parents[1] / "ce-lora-types" / "base.toml"
UPPER, ALL = (3, 4, 5), (0, 1, 2, 3, 4, 5)
SEEDS, VICTIMS, EACH = (0, 1, 2), 2, 4
WARM = 20
"""Local steps before the attack."""
Row = dict[str, Any]


def trained(experiment: Experiment, client: str, tree: Tree, factors: Sequence[str]) -> dict[str, Tensor]:
    """A client's model after ``WARM`` steps of the project's own training."""
    algorithm: Any = experiment.algorithm
    training = algorithm.training
    order = Fit(
        Model(tree),
        (*factors, "head"),
        steps=WARM,
        batch_size=training.batch_size,
        optimizer=training.optimizer,
        split="train",
    )
    ticket = experiment.learner.submit(Job(order, derive(experiment.config.seed, "warm", client), client))
    while not experiment.learner.idle:
        for done, tuned in experiment.learner.advance():
            if isinstance(tuned, Exception):
                raise tuned
            if done == ticket:
                return tuned.params
    raise RuntimeError("the training did not end")


@dataclass(frozen=True, eq=False)
class Seed:
    """One seed's attacked texts (n, 32), labels, owners, the trees of every owner by state, and other texts (m, 32)."""

    ids: Tensor
    labels: Tensor
    owners: list[int]
    trees: Mapping[tuple[str, tuple[int, ...]], list[dict[str, Tensor]]]
    others: Tensor


def prepared(experiment: Experiment, seed: int) -> Seed:
    """The first clients with enough long texts, no two of which begin alike."""
    store, learner = experiment.examples, experiment.learner
    begin: set[tuple[int, ...]] = set()
    chosen: list[tuple[str, list[int]]] = []
    rest: list[int] = []
    for client in experiment.population.seen:
        own: list[int] = []
        for unit in learner.units(client, "train").tolist():
            ids = tuple(store.padded(np.array([unit]))[0].tolist())
            if len(ids) == 32 and ids[1 : LENGTH - 1] not in begin:
                begin.add(ids[1 : LENGTH - 1])
                (own if len(chosen) < VICTIMS and len(own) < EACH else rest).append(unit)
        if len(own) == EACH:
            chosen.append((client, own))
    units = np.array([unit for _, own in chosen for unit in own])
    algorithm: Any = experiment.algorithm
    spec, names = experiment.spec, [name for name, _ in chosen]
    head, trees = spec.start(seed), {}
    for layers in (UPPER, ALL):
        wanted = tuple(f".{i}." for i in layers)
        starts: dict[str, Tree] = {
            "fedit": spec.adapter(spec.ranks, seed),
            "ce-lora": algorithm.begun(spec, seed),
        }
        for name, start in starts.items():
            tree = {k: v for k, v in start.items() if any(w in k for w in wanted)} | head
            factors = ("A", "B") if name == "fedit" else ("A", "B", "C")
            trees[f"{name}, start", layers] = [tree] * VICTIMS
            trees[f"{name}, trained", layers] = [trained(experiment, client, tree, factors) for client in names]
        dense = {
            f"{s}/W": torch.zeros(out, w) for s, (out, w) in spec.sites.items() if any(part in s for part in wanted)
        }
        trees["full, start", layers] = [dense | head] * VICTIMS
    owners = [i for i, (_, own) in enumerate(chosen) for _ in own]
    return Seed(store.padded(units), torch.from_numpy(store.labels[units]), owners, trees, store.padded(np.array(rest)))


def cases(seeds: Sequence[Seed]) -> Iterator[Case]:
    """What the server may see, and what it knows of the rest."""

    def stacked(state: str, layers: tuple[int, ...], other: bool = False) -> dict[str, Tensor]:
        own = [seed.trees[state, layers][(i + other) % VICTIMS] for seed in seeds for i in seed.owners]
        return {name: torch.stack([tree[name] for tree in own]) for name in own[0]}

    for layers in (UPPER, ALL):
        for name, state, seen in (
            ("full weights, start (control)", "full, start", ("W",)),
            ("FedIT, dA and dB, start", "fedit, start", ("A", "B")),
            ("FedIT, dA and dB, trained", "fedit, trained", ("A", "B")),
            ("CE-LoRA, dC, start", "ce-lora, start", ("C",)),
            ("CE-LoRA, dC, trained, A B head granted", "ce-lora, trained", ("C",)),
            ("CE-LoRA, dA and dB, trained, all granted", "ce-lora, trained", ("A", "B")),
        ):
            tree = stacked(state, layers)
            yield Case(name, layers, seen, tree, tree)
        tree = stacked("ce-lora, trained", layers)
        guess = stacked("ce-lora, trained", layers, other=True) | {k: v for k, v in tree.items() if k.endswith("/C")}
        yield Case("CE-LoRA, dC, trained, another client's A B head", layers, ("C",), tree, guess)


@dataclass(frozen=True, eq=False)
class World:
    experiments: list[Experiment]
    target: Target
    cases: list[Case]
    ids: Tensor
    labels: Tensor
    others: list[Tensor]


MATCHED = {(UPPER, 0), (UPPER, 1), (UPPER, 2), (UPPER, 4), (UPPER, 6), (ALL, 0), (ALL, 2), (ALL, 4)}
"""Layers and number of the cases for gradient matching, which costs most."""
SHARED: list[World] = []


def world(data: Path, folder: Path) -> World:
    changes = [f"data.train={data.resolve()}", "model.dtype=float32", "algorithm.name=ce-lora"]
    changes.append(f"adapter.layers={list(ALL)}")
    experiments = [
        assemble(load(BASE, [*changes, f"seed={seed}", f"data.seed={seed}"]), folder / str(seed)) for seed in SEEDS
    ]
    seeds = [prepared(experiment, seed) for experiment, seed in zip(experiments, SEEDS, strict=True)]
    labels = {experiment.population.labels for experiment in experiments}
    assert len(labels) == 1, "the seeds' label spaces differ"
    target = Target(load_backbone("minilm", "text-classification", labels=labels.pop(), targets=["query", "value"]))
    ids, given = (torch.cat([getattr(seed, name) for seed in seeds]) for name in ("ids", "labels"))
    return World(experiments, target, list(cases(seeds)), ids, given, [seed.others for seed in seeds])


def jobs(w: World) -> list[tuple[str, int]]:
    half = len(w.cases) // 2
    known = [(w.cases[i].layers, i % half) for i in range(len(w.cases))]
    silent = 3  # at the start dC is zero: there is nothing to attack
    found = [("matching", i) for i, key in enumerate(known) if key in MATCHED]
    found += [("span check", i) for i, (layers, n) in enumerate(known) if layers == ALL and n != silent]
    found += [("recognition", i) for i, (_, n) in enumerate(known) if n != silent]
    return [*found, ("size", 3), ("size", half + 3), ("guesses", 0), *(("mixtures", i) for i in range(len(SEEDS)))]


def done(job: tuple[str, int]) -> list[Row]:
    """The trials of a job, in a process that was forked when everything was ready."""
    (w,), (part, i) = SHARED, job
    case = w.cases[min(i, len(w.cases) - 1)]
    if part == "mixtures":
        return [{"part": part, "seed": SEEDS[i], **row} for row in mixtures(w.experiments[i], SEEDS[i])]
    if part == "guesses":
        rows = guesses(w.target, w.ids, w.others)
    elif part == "size":
        seen = observed(w.target, case, cut(w.ids, LENGTH), w.labels).values()
        rows = iter([{"text": n, "norm": max(float(g[n].abs().max()) for g in seen)} for n in range(len(w.ids))])
    elif part == "recognition":
        rows = recognition(w.target, case, w.ids, w.labels, w.others)
    else:
        rows = (matching if part == "matching" else span_check)(w.target, case, w.ids, w.labels)
    layers = {} if part == "guesses" else {"layers": f"{case.layers[0]}-{case.layers[-1]}"}
    about = {"part": part, "case": case.name, **layers}
    return [{**about, **row, "seed": SEEDS[row["text"] * len(SEEDS) // len(w.ids)]} for row in rows]


COLUMNS = ("part", "case", "layers", "seed", "client", "text", "tokens", "batch", "noise")


def table(rows: Sequence[Row]) -> str:
    """Mean ± half the 95 % t-interval over trials, by part and setting."""
    lines = ["Mean ± half the 95 % t-interval over trials (texts, batches or clients of all seeds); n trials."]
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        keys = [key for key in ("case", "layers", "noise", "tokens", "batch") if key in own[0]]
        measures = [key for key in own[0] if key not in COLUMNS]
        groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for row in own:
            groups[tuple(row[key] for key in keys)].append(row)
        lines += [
            "",
            f"## {part}",
            "",
            f"| {' | '.join([*keys, 'n', *measures])} |",
            "|---" * (len(keys) + 1 + len(measures)) + "|",
        ]
        for group, members in groups.items():
            cells = [spread([row[key] for row in members]) for key in measures]
            lines.append(f"| {' | '.join([*map(str, group), str(len(members)), *cells])} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return f"{mean:.3f} ± {half:.3f}" if half else f"{mean:.3g}"


def written(out: Path, rows: Sequence[Row]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (out / "table.md").write_text(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1, help="attacks at a time")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        SHARED.append(world(given.data, Path(folder)))
        listed = jobs(SHARED[0])
        rows: list[Row] = []
        with get_context("fork").Pool(given.processes) as pool:
            for job, found in zip(listed, pool.imap(done, listed, chunksize=1)):
                rows += found
                written(given.out, rows)
                print(*job, len(found), flush=True)


if __name__ == "__main__":
    main()
