"""FlexLoRA's server at the shapes of a 1.3 B model: 80 clients' factors to the factors that are served.

A site at a time, its updates drawn as they are needed: all at once exceed memory. A round is the time of one site of
each shape, times their number. The reference is what FlexLoRA's released code does: the dense sum, client by client,
and a full SVD, in float32. Errors are against the truncated SVD of the exact sum in float64.

There are no 1.3 B weights here: decaying updates have what was measured in the training of a small model, by component
and by direction (``benchmarks/decay.py``); flat ones are Gaussian.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.decay import FILE, RANKS
from benchmarks.report import Report

CLIENTS, SEED, ROUNDS = 80, 0, 10
JUDGED = (1, 2, 6, 10)  # rounds whose error is computed: the float64 truth takes longer than everything else
SITES = {(2048, 2048): 24 * 4, (2048, 5504): 24 * 3}
SMALL = {(288, 288): 24 * 4, (288, 640): 24 * 3}
linalg: Any = torch.linalg


@dataclass(frozen=True)
class Case:
    """A site of a federation: its shape (out, in) and its clients' ranks."""

    shape: tuple[int, int]
    ranks: tuple[int, ...]

    @property
    def largest(self) -> int:
        return max(self.ranks)

    def init(self) -> Any:
        """FlexLoRA's state before the first round; scale 1."""
        from fedlora.algorithms.merging import Svd
        from fedlora.federation.spec import Extras, ModelSpec

        spec = ModelSpec({"q": self.shape}, {"q": self.largest}, {}, (), 4, alpha=float(self.largest))
        return Svd().init(spec, SEED, Extras())


Updates = list[tuple[Tensor, Tensor]]


def decaying(case: Case, state: Any, profile: Mapping[str, Any], round: int) -> Updates:
    """(A_i, B_i) of every client: what it was served, and common and own changes as they were measured."""
    a, b = state["served"]["q/A"], state["served"]["q/B"]
    noise = torch.Generator().manual_seed(1000 * round + SEED)
    size = float(b.norm()) or 1.0

    def change(kind: str, rank: int) -> Tensor:
        length = case.shape[1] if kind.endswith("A") else case.shape[0]
        norms = resampled(profile["norms"][kind], case.largest)[:rank]
        drawn = torch.randn(rank, length, generator=noise) * resampled(profile["directions"][kind], length)
        return drawn * (norms / drawn.norm(dim=1).clamp_min(1e-30))[:, None]

    shared = {name: change(f"common {name}", case.largest) for name in "AB"}
    return [
        (
            a[:rank] + shared["A"][:rank] + change("own A", rank),
            b[:, :rank] + size * (shared["B"][:rank] + change("own B", rank)).T,
        )
        for rank in case.ranks
    ]


def flat(case: Case, state: Any, profile: Mapping[str, Any], round: int) -> Updates:
    """Gaussian factors."""
    noise = torch.Generator().manual_seed(1000 * round + SEED)
    out, inner = case.shape
    return [
        (torch.randn(rank, inner, generator=noise), torch.randn(out, rank, generator=noise) / rank**0.5)
        for rank in case.ranks
    ]


def resampled(values: Sequence[float], length: int) -> Tensor:
    """A profile at another length."""
    given = torch.tensor(values)[None, None]
    return functional.interpolate(given, length, mode="linear", align_corners=True).flatten()


def ours(case: Case, state: Any, updates: Updates, round: int) -> Any:
    """The library's server: fold every update, report, decompose."""
    from fedlora.algorithms.merging import Svd

    return Svd().update(state, summed(case, state, updates, round), round)


def summed(case: Case, state: Any, updates: Updates, round: int) -> Any:
    """The first part of it: the exact sum of products."""
    from fedlora.algorithms.merging import Svd
    from fedlora.federation.algorithm import Update
    from fedlora.federation.spec import Client

    merging, one = Svd(), torch.ones(())
    total = merging.aggregator.zero()
    for k, (a, b) in enumerate(updates):
        update = Update({"q/A": a, "q/B": b, "q/scale": one}, 1.0 + k % 3, {})
        total = merging.aggregator.accumulate(total, Client(str(k), {"q": len(a)}), update)
    return merging.aggregator.report(total)


def cold(case: Case, state: Any, updates: Updates, round: int) -> Any:
    """The same without a start: as if nothing had been served before."""
    served = {**state["served"], "q/A": torch.full_like(state["served"]["q/A"], float("nan"))}
    return ours(case, {**state, "served": served}, updates, round)


def reference(case: Case, state: Any, updates: Updates, round: int) -> Any:
    """Dense sum and full SVD in float32."""
    total = torch.zeros(case.shape)
    weights = [1.0 + k % 3 for k in range(len(updates))]
    for weight, (a, b) in zip(weights, updates, strict=True):
        total += weight / sum(weights) * (b @ a)
    u, s, vt = linalg.svd(total, full_matrices=False)
    rank = case.largest
    return {**state, "served": {**state["served"], "q/A": vt[:rank], "q/B": u[:, :rank] * s[:rank]}}


@dataclass(frozen=True)
class Truth:
    """The exact sum and its best approximation, in float64."""

    exact: Tensor
    best: Tensor
    spectrum: Tensor

    @staticmethod
    def of(case: Case, updates: Updates) -> Truth:
        weights = [1.0 + k % 3 for k in range(len(updates))]
        left = torch.cat([weight / sum(weights) * b.double() for weight, (_, b) in zip(weights, updates)], 1)
        exact = left @ torch.cat([a.double() for a, _ in updates])
        values, vectors = linalg.eigh(exact @ exact.T)
        kept = vectors[:, -case.largest :]
        return Truth(exact, kept @ (kept.T @ exact), values.flip(0).clamp_min(0).sqrt())

    def error(self, state: Any) -> dict[str, float]:
        """Distance to the best product, and what is lost beyond what the best loses (``lowrank``), shares of |dW|."""
        served = state["served"]["q/B"].double() @ state["served"]["q/A"].double()
        size = float(self.exact.norm())
        beyond = float((self.exact - served).square().sum() - (self.exact - self.best).square().sum())
        return {"error": float((served - self.best).norm()) / size, "excess": max(0.0, beyond) ** 0.5 / size}


def timed(way: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    value = way(*given)
    return time.perf_counter() - start, value


def site(case: Case, draw: Any, profiles: Sequence[Any], repeats: int) -> dict[str, Any]:
    """A first round at one site: alternating repeats of the reference and of the library."""
    state = case.init()
    updates = draw(case, state, profiles[0], 1)
    ways = {"sum": summed, "ours": ours, "reference": reference}
    times: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for name in [*ways] * repeats + ["sum", "ours"]:
        seconds, results[name] = timed(ways[name], case, state, updates, 1)
        times[name].append(seconds)
    truth = Truth.of(case, updates)
    return {
        "seconds": times,
        "errors": {name: truth.error(results[name]) for name in ("ours", "reference")},
        "spectrum": spectrum(truth, case),
    }


def spectrum(truth: Truth, case: Case) -> dict[str, float]:
    """Some singular values and what the largest rank loses, as shares of |dW|."""
    s = truth.spectrum / truth.spectrum.norm()
    places = [k for k in (1, 10, 50, 100, 200, 300) if k <= len(s)]
    return {**{str(k): float(s[k - 1]) for k in places}, "rest": float(s[case.largest :].norm())}


def ten(case: Case, profiles: Sequence[Any], rounds: int) -> Iterator[dict[str, Any]]:
    """Consecutive rounds at one site: each starts from what the last served; beside it, the same without a start."""
    state = case.init()
    for round in range(1, rounds + 1):
        updates = decaying(case, state, profiles[round - 1], round)
        without, _ = timed(cold, case, state, updates, round)
        seconds, after = timed(ours, case, state, updates, round)
        drift = after["served"]["q/A"] @ state["served"]["q/A"].T
        line: dict[str, Any] = {
            "round": round,
            "seconds": seconds,
            "without start": without,
            "drift": float((1 - drift.square().sum(1)).clamp_min(0).mean().sqrt()),
        }
        if round in JUDGED:
            truth = Truth.of(case, updates)
            line |= {**truth.error(after), "spectrum": spectrum(truth, case)}
        yield line
        state = after


def run(quick: bool = False) -> Report:
    """All ranks, both spectra, both shapes; and ten rounds."""
    from fedlora.learning.footprint import prepare

    prepare()  # large blocks are reused, for both ways, as in every process that serves a run
    shapes, repeats, rounds = (SMALL, 1, 2) if quick else (SITES, 5, ROUNDS)
    profiles = json.loads(FILE.read_text())
    rows: list[tuple[object, ...]] = []
    details: dict[str, Any] = {}
    for name, ranks in RANKS.items():
        cases = {shape: Case(shape, tuple(islice(cycle(ranks), CLIENTS))) for shape in shapes}
        base = 0.0
        for kind, draw in (("decaying", decaying), ("flat", flat)):
            found = {shape: site(case, draw, profiles[name], repeats) for shape, case in cases.items()}
            say(f"{name} {kind}", found)
            details[f"{name}, {kind}"] = keyed(found)
            total = {
                way: sum(shapes[shape] * statistics.median(one["seconds"][way]) for shape, one in found.items())
                for way in ("reference", "ours", "sum")
            }
            base = base or total["reference"]
            rows.append((f"{name}, {kind}, first round", *line(total["reference"], total, found.values())))
        series = {shape: list(ten(case, profiles[name], rounds)) for shape, case in cases.items()}
        say(f"{name} rounds", series)
        details[f"{name}, rounds"] = keyed(series)
        for label, key in (("warm", "seconds"), ("without a start", "without start")):
            total = {
                "ours": sum(
                    shapes[shape] * statistics.median(one[key] for one in each[1:]) for shape, each in series.items()
                )
            }
            errors = [{"errors": {"ours": one}} for each in series.values() for one in each[1:] if "error" in one]
            rows.append((f"{name}, decaying, rounds 2-{rounds}, {label}", *line(base, total, errors)))
    return Report(
        "aggregation",
        "FlexLoRA's server at 1.3 B shapes, a round of 80 clients",
        (
            "updates",
            "reference, s",
            "fedlora, s",
            "of it the sum, s",
            "times faster",
            "error",
            "excess",
            "error of the reference",
        ),
        rows,
        notes(shapes, repeats),
        details,
    )


def line(reference: float, total: Mapping[str, float], found: Any) -> tuple[object, ...]:
    """Seconds of both, their ratio, the largest errors."""
    ours = total["ours"]
    errors = [one["errors"] for one in found]
    worst = [f"{max(one['ours'][name] for one in errors):.1e}" for name in ("error", "excess")]
    theirs = [one["reference"]["error"] for one in errors if "reference" in one]
    return (
        reference,
        ours,
        total.get("sum"),
        f"{reference / ours:.1f}x",
        *worst,
        f"{max(theirs):.1e}" if theirs else None,
    )


def keyed(found: Mapping[tuple[int, int], Any]) -> dict[str, Any]:
    return {f"{out} x {inner}": value for (out, inner), value in found.items()}


def say(what: str, found: Any) -> None:
    print(what, json.dumps(keyed(found)), file=sys.stderr, flush=True)


def notes(shapes: Mapping[tuple[int, int], int], repeats: int) -> tuple[str, ...]:
    """How it was measured."""
    listed = ", ".join(f"{count} of {out} x {inner}" for (out, inner), count in shapes.items())
    return (
        f"{listed}; one site of each was timed and multiplied by its number: all updates at once exceed memory; "
        f"fedlora before and after the reference, which ran {repeats}x for each line, medians; drawing updates is not "
        "counted",
        f"{CLIENTS} clients whose ranks take turns: sums of ranks "
        + ", ".join(f"{sum(islice(cycle(ranks), CLIENTS))} ({name})" for name, ranks in RANKS.items()),
        "reference: the dense sum client by client and a full SVD, float32; later rounds are compared with its first",
        "fedlora: every update folded, the sum reported (dW itself is part of the state), the adapter of the largest "
        "rank and its truncation error; the sum alone was timed beside it",
        "error: |served product - truncated SVD in float64| / |dW|; excess: what is lost beyond what the best loses, "
        "the measure where singular values tie at the cut; the largest over shapes and over rounds 2, 6 and 10",
        "decaying: there are no 1.3 B weights here; clients' changes have the sizes by component and the singular "
        "values by direction measured over ten rounds of FlexLoRA on MiniLM (`benchmarks/decay.py`), drawn at these "
        "shapes; flat: Gaussian factors; the drawn aggregate has a sharper knee at the largest rank than the "
        "measured one (both are in the JSON files), which flatters the iteration: a rounder knee takes it more "
        "products",
    )
