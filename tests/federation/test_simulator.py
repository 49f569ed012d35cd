"""The simulator: what it holds at once, and what happens when a client fails."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from federation.doubles import SPEC, Slow, Toy, request, simulator
from fedlora.engines.simulator import WINDOW
from fedlora.federation.algorithm import Update
from fedlora.federation.client import Job
from fedlora.federation.memory import RamMemory
from fedlora.federation.orders import Model, Score, Work
from fedlora.federation.rounds import rounds
from fedlora.federation.sampling import Cohorts
from fedlora.federation.spec import Local, Tree
from fedlora.federation.wire import frame_size


def test_a_round_of_a_thousand_clients_holds_a_handful() -> None:
    """Payloads are built when a client starts and updates are folded as they come: counted, not timed."""
    toy, executor = Toy(), Slow()
    report = list(rounds(toy, SPEC, simulator(executor, 1000, 4, toy), total=1, seed=0))[-1]
    assert len(report.folded) == 1000
    assert torch.equal(report.state["head/bias"], torch.ones(3))
    assert toy.payloads.peak <= 4 + 2
    assert toy.updates.peak <= 4 + 2
    assert max(executor.open) == 4
    assert report.bytes["down"] == 1000 * frame_size({"head/bias": torch.zeros(3)})


def test_a_slow_client_bounds_what_waits_for_it() -> None:
    toy, executor = Toy(), Slow(last="c0000")
    report = list(rounds(toy, SPEC, simulator(executor, 400, 4, toy), total=1, seed=0))[-1]
    assert len(report.folded) == 400
    assert 10 < toy.updates.peak <= WINDOW + 2


def test_a_failed_job_loses_its_client_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    fleet = simulator(Slow(failing=frozenset({"c0001", "c0003"})), 5, 3)
    reports = list(rounds(fleet.algorithm, SPEC, fleet, total=2, seed=0))
    assert all(report.lost == ("c0001", "c0003") for report in reports[1:])
    assert all(report.folded == ("c0000", "c0002", "c0004") for report in reports[1:])
    assert "c0001" in caplog.text
    assert "FloatingPointError: diverged" in caplog.text


@dataclass(eq=False)
class Counted(RamMemory):
    """Notes when it is made durable."""

    client: str
    flushed: list[str]

    def __post_init__(self) -> None:
        super().__init__(self.client)

    def flush(self) -> None:
        self.flushed.append(self.client)


def test_what_a_round_makes_durable_does_not_grow_with_the_clients_of_earlier_ones() -> None:
    flushed: list[str] = []
    fleet = replace(simulator(Slow(), 40, 2), store=lambda id: Counted(id, flushed))
    seen: set[str] = set()
    for report in rounds(fleet.algorithm, SPEC, fleet, total=9, seed=0, sampler=Cohorts(4)):
        fleet.flush()
        assert sorted(flushed) == list(report.folded)
        seen |= {*flushed}
        flushed.clear()
    assert len(seen) > 20


@dataclass(frozen=True)
class Pairs(Toy):
    """Two orders at once, an empty tuple, then the end; ``closed`` counts programs that were ended properly."""

    closed: list[str] = field(default_factory=list)

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        try:
            answers = yield (Score(Model(payload), "fit"), Score(Model(payload), "holdout"))
            assert len(answers) == 2
            assert (yield ()) == ()
            return Update({"head/bias": torch.ones(3)}, 1.0, {}), memory
        finally:
            self.closed.append(local.client.id)


def test_tuples_of_orders_and_programs_that_are_left() -> None:
    algorithm = Pairs()
    fleet = simulator(Slow(failing=frozenset({"c0002"})), 4, 2, algorithm)
    report = list(rounds(algorithm, SPEC, fleet, total=1, seed=0))[-1]
    assert report.folded == ("c0000", "c0001", "c0003")
    assert sorted(algorithm.closed) == [f"c000{k}" for k in range(4)]
    algorithm.closed.clear()
    replies = fleet.ask({id: request("train", id) for id in fleet.clients})
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    assert len(algorithm.closed) == 2  # the one that answered and the one that was held at its yield


def test_an_executor_that_forgets_a_job_is_an_error() -> None:
    executor = Slow()
    fleet = simulator(executor, 2, 2)
    executor.submit = lambda job: 7  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="nothing to do"):
        list(fleet.ask({id: request("train", id) for id in fleet.clients}))


def test_an_error_of_the_algorithm_ends_the_run() -> None:
    @dataclass(frozen=True)
    class Broken(Toy):
        def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
            raise KeyError("a typo")
            yield

    algorithm = Broken()
    with pytest.raises(KeyError, match="a typo"):
        list(rounds(algorithm, SPEC, simulator(Slow(), 2, 2, algorithm), total=1, seed=0))


@dataclass(frozen=True)
class Scored(Toy):
    """Asks for one score before it says what it would deploy."""

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[dict[str, Model]]:
        sums = yield from Score(Model(payload), "holdout")
        return {"mine": Model({"head/bias": torch.full((3,), sums["loss"][1])}), "other": Model(payload)}


def test_the_models_of_a_client_without_scoring_them() -> None:
    executor = Slow()
    fleet = simulator(executor, 2, 1, Scored())
    executor.submit(Job(Score(Model({}), "train"), 0, "c0001"))  # left over from a client that was lost
    models = fleet.models("c0000", request("evaluate", "c0000"))
    assert list(models) == ["mine", "other"]
    assert torch.equal(models["mine"].params["head/bias"], torch.ones(3))
    executor.failing = frozenset({"c0000"})
    with pytest.raises(FloatingPointError, match="diverged"):
        fleet.models("c0000", request("evaluate", "c0000"))
