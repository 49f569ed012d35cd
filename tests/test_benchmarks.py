"""The parts of benchmarks that are no measurement: names, clocks, verdicts, made-up data."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from benchmarks import clients, codec, mixing, scheduler
from benchmarks.__main__ import BENCHMARKS
from benchmarks.gpu import Check

from fedlora.federation.client import Job
from fedlora.federation.orders import Model, Score
from fedlora.federation.wire import frame_size


def test_every_name_can_be_run() -> None:
    assert {"clients", "mixing", "codec", "scheduler", "peers"} <= set(BENCHMARKS)
    assert all(callable(run) for run in BENCHMARKS.values())


class Doing:
    """An executor whose every call takes as many ticks as it says."""

    def __init__(self, clock: count[int]) -> None:
        self.clock, self.idle = clock, False

    def submit(self, job: Job) -> int:
        next(self.clock), next(self.clock)
        return next(self.clock)

    def advance(self) -> list[tuple[int, object]]:
        for _ in range(10):
            next(self.clock)
        raise RuntimeError("also work that fails is work")


def test_the_clock_tells_work_from_what_is_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(scheduler.time, "perf_counter", lambda: next(ticks))
    clock = scheduler.Clock(Doing(ticks))  # type: ignore[arg-type]
    clock.submit(Job(Score(Model({}), "test", None), 0, "a"))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            clock.advance()
    assert (clock.checking, clock.working, clock.idle) == (4, 22, False)


@pytest.mark.parametrize(
    ("apart", "skipped", "wrong"),
    [(1e-4, "", False), (1e-2, "", True), (float("nan"), "", True), (None, "no GPU", False), (None, "", True)],
)
def test_what_is_not_shown_to_be_right_is_wrong(apart: float | None, skipped: str, wrong: bool) -> None:
    check = Check("lanes", apart, 1e-3, skipped)
    assert check.wrong is wrong
    assert ("WRONG" in check.text) is wrong


def test_a_population_is_the_same_every_time(tmp_path: Path) -> None:
    case = clients.Case(clients=30, examples=4, cohort=3, rounds=1)
    one, other = (clients.write_data(tmp_path / name, case).read_text() for name in ("a", "b"))
    rows = [json.loads(line) for line in one.splitlines()]
    assert one == other
    assert len(rows) == 120
    assert len({row["client"] for row in rows}) == 30
    assert {row["label"] for row in rows} == set(clients.LABELS)
    assert 15 < sum(len(row["text"].split()) for row in rows) / len(rows) < 33


def test_a_small_server_of_mixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "FITTED", 2)
    known, _ = mixing.fitted()
    found = mixing.measured(4, known)
    assert found["pairs"] == 6
    numbers = mixing.SITES * mixing.RANK**2
    assert 4 * numbers < found["up"] < 4 * numbers + 100 * mixing.SITES


def test_frames_of_narrower_types_are_smaller() -> None:
    sizes = [frame_size(codec.tree({"q": (64, 48)}, 8, dtype)) for dtype in codec.TYPES]
    numbers = 8 * (64 + 48)
    assert [size // numbers for size in sizes] == [torch.empty((), dtype=dtype).element_size() for dtype in codec.TYPES]
