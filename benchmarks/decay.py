"""What real training does to adapters in FlexLoRA, as numbers from which updates of any size can be drawn.

MiniLM learns the docstring demonstration's label; the clients are packages with ranks 8, 30 and 200 (or 4, 8, 16) in
turn. Every round, at every site, with the served ``A`` (orthonormal rows) and ``B = U S / s``:

    dB_i = s (B_i - B) / |S|,   dA_i = A_i - A        what a client changed, in units of the adapter's own norm
    common: their mean over the clients;  own: what is left of each

Of each of the four, the norm by component (the k-th of the adapter) and the singular values by direction (of the site's
inputs or outputs) are kept: an update is drawn as ``norms_k x gaussian x directions_j``. ``python -m benchmarks.decay``
writes ``benchmarks/decay.json``, which ``benchmarks.aggregation`` reads.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).parent / "decay.json"
RANKS = {"8/30/200": (8, 30, 200), "4/8/16": (4, 8, 16)}
ROUNDS, POINTS = 10, 48
PLACES = (1, 2, 5, 10, 20, 50, 100, 200, 300)
"""Of the aggregate's spectrum that are kept."""
linalg: Any = torch.linalg


def train(ranks: Sequence[int], rounds: int) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], list[Any]]]:
    """(server's state before, after, the round's updates by client) of every round."""
    from fedlora.algorithms.flexlora import FlexLoRA
    from fedlora.demos.docstrings import write_data
    from fedlora.federation import rounds as federation
    from fedlora.federation.aggregate import Products
    from fedlora.study.config import parse
    from fedlora.study.experiment import assemble

    seen: list[Any] = []

    @dataclass(frozen=True)
    class Listening(Products):
        def accumulate(self, acc: Mapping[str, Any], client: Any, update: Any) -> dict[str, Any]:
            seen.append((client.ranks, update))
            return super().accumulate(acc, client, update)

    @dataclass(frozen=True)
    class Listened(FlexLoRA):
        @property
        def aggregator(self) -> Products:
            return Listening()

    with tempfile.TemporaryDirectory() as place:
        write_data(Path(place) / "data", 0)
        config = {
            "model": {"name": "minilm", "task": "text-classification", "dtype": "float32"},
            "data": {
                "train": str(Path(place) / "data" / "train.jsonl"),
                "text": "text",
                "label": "label",
                "max_length": 48,
                "partition": {"by": "column", "column": "client"},
            },
            "adapter": {"rank": max(ranks)},
            "clients": {"ranks": list(ranks)},
            "algorithm": {"name": "flexlora"},
            "training": {"rounds": rounds, "batch_size": 8, "lr": 0.002, "eval_every": 0},
        }
        made = assemble(parse(config, "config"), Path(place) / "run")
        algorithm = Listened(training=made.algorithm.training, extras=made.algorithm.extras)
        before: Any = None
        reports = federation.rounds(
            algorithm, made.spec, made.fleet, total=rounds, seed=0, sampler=made.sampler, limits=made.limits
        )
        for report in reports:
            after = report.checkpoint["state"]
            if before is not None:
                yield before, after, list(seen)
            seen.clear()
            before = after
            report.saved()


@dataclass(frozen=True)
class Pieces:
    """Of one round: norms by component and singular values by direction, of common and own changes; and the spectrum of
    the aggregate at ``PLACES``, as shares of |dW|, the share beyond the largest rank, and how far each right singular
    vector is from the span of the last round's."""

    norms: Mapping[str, list[float]]
    directions: Mapping[str, list[float]]
    spectrum: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)


def measure(before: Mapping[str, Any], after: Mapping[str, Any], seen: Sequence[Any]) -> Pieces:
    """The means over the sites of the model."""
    from fedlora.adapters.algebra import product, ranks

    found: list[Pieces] = []
    for site in ranks(before["served"]):
        start, end, scale = before["served"], after["served"], float(before["served"][f"{site}/scale"])
        a, b = start[f"{site}/A"], start[f"{site}/B"] * scale
        size = float(b.norm()) or 1.0  # nothing was learned yet: in the units of the model
        rank = len(a)
        changes: dict[str, list[Tensor]] = {"A": [], "B": []}
        for _, update in seen:
            mine = len(update.arrays[f"{site}/A"])
            changes["A"].append(_padded(update.arrays[f"{site}/A"] - a[:mine], rank))
            changes["B"].append(_padded((update.arrays[f"{site}/B"] * scale - b[:, :mine]).T / size, rank))
        norms, directions = dict[str, list[float]](), dict[str, list[float]]()
        for name, each in changes.items():
            held = torch.stack([(one != 0).any(1).float() for one in each])[:, :, None]
            common = torch.stack(each).sum(0) / held.sum(0).clamp_min(1)
            own = torch.cat([(one - common) * h for one, h in zip(each, held, strict=True)])
            count = held[:, :, 0].sum(0).clamp_min(1)
            spread = own.view(len(each), rank, -1).square().sum((0, 2)) / (count - 1).clamp_min(1)
            for kind, norm, value in (("common", common.norm(dim=1), common), ("own", spread.sqrt(), own)):
                norms[f"{kind} {name}"] = norm.tolist()
                s = linalg.svdvals(value)
                directions[f"{kind} {name}"] = _resampled(s / s.norm(), POINTS)
        s = linalg.svdvals(product(after["exact"], site).double())
        spectrum, rest = (s / s.norm())[[k - 1 for k in PLACES]].tolist(), [float(s[rank:].norm() / s.norm())]
        kept = end[f"{site}/A"] @ a.T
        drift = (1 - kept.square().sum(1)).clamp_min(0).sqrt()
        found.append(Pieces(norms, directions, spectrum, rest, _resampled(drift, POINTS)))
    return mean(found)


def mean(found: Sequence[Pieces]) -> Pieces:
    """Name by name, point by point."""

    def of(rows: list[list[float]]) -> list[float]:
        size = min(len(row) for row in rows)
        return [float(f"{sum(row[k] for row in rows) / len(rows):.3g}") for k in range(size)]

    names = found[0].norms
    return Pieces(
        {name: of([one.norms[name] for one in found]) for name in names},
        {name: of([one.directions[name] for one in found]) for name in names},
        of([one.spectrum for one in found]),
        of([one.rest for one in found]),
        of([one.drift for one in found]),
    )


def _padded(rows: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(rows.float(), (0, 0, 0, rank - len(rows)))


def _resampled(values: Tensor, points: int) -> list[float]:
    """At ``points`` places from the first to the last, evenly."""
    return (
        torch.nn.functional.interpolate(values.float()[None, None], points, mode="linear", align_corners=True)
        .flatten()
        .tolist()
    )


def main() -> None:
    """Trains with both sets of ranks and writes the file."""
    kept: dict[str, Any] = {}
    for name, ranks in RANKS.items():
        kept[name] = []
        for before, after, seen in train(ranks, ROUNDS):
            pieces = measure(before, after, seen)
            kept[name].append(vars(pieces))
            print(name, len(kept[name]), pieces.spectrum, pieces.rest, pieces.drift[::8], flush=True)
    FILE.write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
