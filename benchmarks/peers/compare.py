"""fedlora's simulator, Flower's and pfl-research's on the same federations: client-steps a second, ratios, memory.

Every federation is a fresh process (Flower's: a family of them), ours as theirs; the ways take turns.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.lanes import ALPHA, LABELS, RANK
from benchmarks.peers.cases import OURS, OWN, PEERS, TUNED, WAYS, Case, candidates, cases, crowds, plain, start
from benchmarks.peers.environments import FLOWER, PFL
from benchmarks.peers.flops import Encoder, peak
from benchmarks.peers.processes import Run, Setting
from benchmarks.report import Report
from fedlora.federation.spec import ModelSpec
from fedlora.learning.loading import load_backbone
from fedlora.study.resolution import FAST, TOKENS

MINILM = Encoder(layers=6, width=384, inner=1536, rank=RANK)


@dataclass
class Outcome:
    """What a way did on a case: its runs, or why there are none."""

    setting: Setting = field(default_factory=Setting)
    runs: list[Run] = field(default_factory=list[Run])
    failure: str | None = None

    @property
    def seconds(self) -> list[float]:
        """Of a round, by repeat."""
        return [statistics.median(run.seconds) for run in self.runs]

    @property
    def megabytes(self) -> float | None:
        """The peak of memory."""
        known = [run.megabytes for run in self.runs if run.megabytes is not None]
        return statistics.median(known) if known else None


@dataclass(frozen=True)
class Measured:
    """A case with what all ways did; ``work``: operations of a client-step; ``peak``: operations a second."""

    case: Case
    outcomes: Mapping[str, Outcome]
    work: float
    peak: float

    def rate(self, way: str) -> float:
        """Client-steps a second."""
        return statistics.median(self.case.client_steps / value for value in self.outcomes[way].seconds)

    def ratios(self, way: str) -> dict[str, float]:
        """How many times faster each of our ways is, by turns."""
        found: dict[str, float] = {}
        for own in OWN:
            pairs = list(zip(self.outcomes[own].seconds, self.outcomes[way].seconds)) if own in self.outcomes else []
            if pairs:
                found[own] = statistics.median(theirs / ours for ours, theirs in pairs)
        return found

    def cell(self, way: str) -> str | None:
        """A way's place in the table."""
        outcome = self.outcomes.get(way)
        if outcome is None:
            return None
        if not outcome.runs:
            return "failed"
        times = ", ".join(f"{ratio:.2f}x" for ratio in self.ratios(way).values())
        if not self.case.memory:
            return f"{self.rate(way):.1f} ({times}{'; ' * bool(times)}{self.share(way):.0%})"
        memory = "" if outcome.megabytes is None else f", {outcome.megabytes:,.0f} MB"
        return f"{statistics.median(outcome.seconds):.1f} s{f' ({times})' * bool(times)}{memory}"

    def share(self, way: str) -> float:
        """Of the peak of bfloat16 products."""
        return self.rate(way) * self.work / self.peak

    def details(self) -> dict[str, Any]:
        """For the JSON."""
        found: dict[str, Any] = {"flops_per_client_step": self.work, "bf16_gemm_peak": self.peak}
        for way, outcome in self.outcomes.items():
            found[way] = {
                "client_steps_per_second": self.rate(way) if outcome.runs else None,
                "ratios": self.ratios(way),
                "share_of_peak": self.share(way) if outcome.runs else None,
                "megabytes": outcome.megabytes,
                "setting": asdict(outcome.setting),
                "failure": outcome.failure,
                "runs": [asdict(run) for run in outcome.runs],
            }
        return found


def attempt(way: str, case: Case, outcome: Outcome, folder: Path, spec: ModelSpec) -> Run | None:
    """One federation; None if it failed (then the outcome says why)."""
    try:
        found = start(way, replace(case.task(folder, spec), setting=outcome.setting))
    except (RuntimeError, OSError) as error:
        outcome.failure = str(error)
        print(f"{case.name}: {way}: {error}", file=sys.stderr, flush=True)
        return None
    rate = case.client_steps / statistics.median(found.seconds)
    what = f"{outcome.setting.text}, " if way in TUNED else ""
    print(f"{case.name}: {way}: {what}{rate:.1f}/s, {found.megabytes or 0:.0f} MB", file=sys.stderr, flush=True)
    return found


def tuned(way: str, case: Case, settings: Sequence[Setting], folder: Path, spec: ModelSpec) -> Outcome:
    """The setting in which a short federation is fastest."""
    if len(settings) == 1:
        return Outcome(settings[0])
    best, least = Outcome(), float("inf")
    small = replace(case, name=f"{case.name}, tuning", clients=min(case.clients, case.pilot), rounds=1)
    for setting in settings:
        outcome = Outcome(setting)
        found = attempt(way, small, outcome, folder, spec)
        if found is not None and found.seconds[0] < least:
            best, least = outcome, found.seconds[0]
        elif best.failure is None and least == float("inf"):
            best.failure = outcome.failure
    return best


def measured(case: Case, settings: Sequence[Setting], folder: Path, spec: ModelSpec) -> Measured:
    """All ways on one case, taking turns."""
    outcomes = {way: Outcome(plain(way)) for way in case.ways}
    for way in case.ways:
        if way in TUNED:
            outcomes[way] = tuned(way, case, settings, folder, spec)
    lengths, most = case.lengths(spec), 0.0
    for _ in range(case.repeats):
        most = max(most, peak(MINILM, min(FAST, round(case.clients * case.shape.batch * lengths.mean()))))
        for way, outcome in outcomes.items():
            if outcome.failure is None and (found := attempt(way, case, outcome, folder, spec)) is not None:
                outcome.runs.append(found)
    return Measured(case, outcomes, MINILM.per_step(lengths, case.client_steps), most)


def versions() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Makes the environments: what is in each, and why another could not be made."""
    found: dict[str, dict[str, str]] = {}
    failures: dict[str, str] = {}
    for environment in (FLOWER, PFL):
        try:
            environment.ready()
            found[environment.name] = environment.versions()
        except (RuntimeError, OSError) as error:
            failures[environment.name] = str(error)
    return found, failures


def notes(results: Sequence[Measured], found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """How it was measured, what tuning chose and what failed."""
    first = results[0].case
    each = "one step" if first.steps == 1 else f"{first.steps} steps"
    types = {r.case.name: sorted({run.details["type"] for run in r.outcomes[OURS].runs}) for r in results}
    lines = [
        f"MiniLM, LoRA of rank {RANK} on query and value and a head, AdamW; {first.clients:,} clients of {each} a "
        "round",
        "client-steps a second (how many times faster fedlora is in one process, then with a process per core; share "
        "of the bfloat16 peak), or seconds of a round (the same ratios) and peak memory of all processes together, "
        "pages that they share counted once",
        f"fresh processes that take turns, {first.repeats} of each; a round of {min(20, first.clients)} clients warms "
        f"each up, and the median of the rounds after it ({first.rounds}) counts; ratios are medians of each turn's "
        "own",
        "as users run it: training mode (the model's dropout of 0.1), SDPA, float32, default libraries and resources; "
        "tuned: no dropout, eager attention and the fastest of float32 or bfloat16 autocast with one process or as "
        "many as there are cores, found by a short run of each. In both, a process keeps the loaded model (Flower's "
        "examples load it for every message) and a batch is padded to its own longest text",
        "share of the peak: products of a client-step without padding, counted by hand, against the products of one "
        "layer of frozen linears at the tokens of a fused pass, measured between the turns",
        f'fedlora: everything "auto" (lanes that fill {FAST} tokens a pass in bfloat16, {TOKENS} in float32; '
        + "; ".join(f"{name}: {' or '.join(kinds)}" for name, kinds in types.items() if kinds)
        + '); no dropout; a process per core: the same with [engine] name = "ray", one thread each',
    ]
    for name, packages in found.items():
        lines.append(f"environment of {name}: " + ", ".join(f"{key} {value}" for key, value in packages.items()))
    for result in results:
        chosen = [f"{w}: {o.setting.text}" for w, o in result.outcomes.items() if w in TUNED and o.runs]
        lines += [f"tuning for {result.case.name} chose: " + "; ".join(chosen)] if chosen else []
        failed = {way: outcome.failure for way, outcome in result.outcomes.items() if outcome.failure}
        lines += [f"failed on {result.case.name}: {way}: {why}" for way, why in failed.items()]
    return lines


def table(name: str, title: str, results: Sequence[Measured], found: Mapping[str, Mapping[str, str]]) -> Report:
    """The report of what was measured."""
    rows = [(way, *(result.cell(way) for result in results)) for way in WAYS]
    details = {"versions": found, "cases": {result.case.name: result.details() for result in results}}
    return Report(name, title, ("way", *(result.case.name for result in results)), rows, notes(results, found), details)


def shapes(quick: bool = False) -> Report:
    """Batches of several shapes."""
    return compared("peers", "Federations of MiniLM in fedlora's simulator and in others'", cases(quick), quick)


def many(quick: bool = False) -> Report:
    """Many small clients."""
    return compared("peers-many", "Many small clients in fedlora's simulator and in others'", crowds(quick), quick)


def compared(name: str, title: str, given: Sequence[Case], quick: bool) -> Report:
    """Every way on every case. A peer whose environment cannot be made has rows that say so."""
    found, failures = versions()
    spec = load_backbone("minilm", "text-classification", labels=LABELS).spec(RANK, ALPHA)
    settings, results = candidates(quick), list[Measured]()
    with tempfile.TemporaryDirectory() as place:
        for case in given:
            out = [way for way in case.ways if way in PEERS and PEERS[way].name in failures]
            able = replace(case, ways=[way for way in case.ways if way not in out])
            result = measured(able, settings[-1:] if quick and results else settings, Path(place), spec)
            missing = {way: Outcome(failure=failures[PEERS[way].name]) for way in out}
            results.append(replace(result, outcomes={**result.outcomes, **missing}))
    return table(name, title, results, found)
