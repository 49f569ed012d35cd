"""The loop's machinery: order, refusals, versions, bytes, and what it holds at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.table import world
from fedlora.adapters.algebra import difference
from fedlora.engines.simulator import WINDOW, Simulator
from fedlora.errors import UserError
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Reply, Update
from fedlora.federation.client import Job, numbered
from fedlora.federation.memory import RamMemory
from fedlora.federation.orders import Model, Score, Work
from fedlora.federation.rounds import evaluate, fault, in_order, once, rounds
from fedlora.federation.sampling import Cohorts
from fedlora.federation.spec import Client, Local, ModelSpec, Tree
from fedlora.federation.wire import encode, frame_size

# ---------------------------------------------------------------- replies


@settings(max_examples=100, deadline=None)
@given(st.permutations("abcdef"), st.lists(st.sampled_from("abcdefxyz"), max_size=6))
def test_every_name_once_and_in_order_whatever_arrives(arrivals: list[str], noise: list[str]) -> None:
    """Duplicates and strangers are dropped, the silent are lost."""
    stream = [(name, Reply("run", "train", 1)) for name in arrivals[:4] + noise]
    answered = {name for name, _ in stream}
    for buffer in (in_order, once):
        out = list(buffer(iter(stream), "abcdef"))
        assert sorted(name for name, _ in out) == list("abcdef")
        assert {name for name, reply in out if reply is not None} == answered & set("abcdef")
    assert [name for name, _ in in_order(iter(stream), "abcdef")] == list("abcdef")


def test_the_buffer_passes_on_at_once_what_is_due() -> None:
    seen: list[str] = []

    def arrive() -> Iterator[tuple[str, Reply | None]]:
        for name in "bacd":
            seen.append(name)
            yield name, None

    assert [("".join(seen), name) for name, _ in in_order(arrive(), "abcd")] == [
        ("ba", "a"),
        ("ba", "b"),
        ("bac", "c"),
        ("bacd", "d"),
    ]


def test_a_late_reply_to_an_earlier_round_is_dropped() -> None:
    fleet, old = world("fedit"), dict[str, Any]()
    ask = fleet.ask

    def asked(requests: Any) -> Iterator[Any]:
        for id, reply in ask(requests):
            old.setdefault(id, reply)
            yield id, (old[id] if id == "c3" else reply)

    fleet.ask = asked  # type: ignore[method-assign]
    reports = list(rounds(fleet.algorithm, fleet.spec, fleet, total=2, seed=0))
    assert "c3" in reports[1].folded
    assert reports[2].lost == ("c3",)
    assert reports[2].checkpoint["acked"]["c3"] == 1


# ---------------------------------------------------------------- refusals


def test_norm_limit_sums_and_weights() -> None:
    client = Client("c", {}, examples=10)
    expected = {"x": (2,), "y": None}
    good = Update({"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([[4]])}, 10.0, {"train_loss": (1.0, 2.0)})

    def problem(update: Update | None, **options: Any) -> str:
        return str(fault(update, expected, client, **options))

    assert problem(good) == problem(good, max_norm=5.0, dtype=torch.float32) == "None"
    assert "norm 5 is above the limit 4.9" in problem(good, max_norm=4.9)
    assert "type torch.float32" in problem(good, dtype=torch.float64)  # y has no agreed shape: any type
    for weight in (0.0, -1.0, 10.5, float("nan"), float("inf")):
        assert "weight" in problem(Update(good.arrays, weight, {}))
    assert "not finite" in problem(Update(good.arrays, 1.0, {"train_loss": (float("nan"), 1.0)}))
    assert problem(None) == "no update"
    assert "weight" in str(fault(Update({}, float("inf"), {}), {}, Client("c", {})))


def test_a_rejected_update_is_counted_and_its_memory_is_never_asked_for() -> None:
    fleet = world("local")
    reports = rounds(fleet.algorithm, fleet.spec, fleet, total=2, seed=0)
    next(reports)
    fleet.inner.clients = {**fleet.clients, "c2": Client("c2", fleet.clients["c2"].ranks, examples=3)}
    first = next(reports)
    assert set(first.rejected) == {"c2"}
    assert "weight" in first.rejected["c2"]
    assert "c2" not in first.checkpoint["acked"]
    assert len(first.folded) == 6


def test_an_update_beyond_the_norm_limit_is_dropped() -> None:
    fleet = world("fedit")
    report = list(rounds(fleet.algorithm, fleet.spec, fleet, total=1, seed=0, max_norm=1e-6))[-1]
    assert len(report.rejected) == 7
    assert report.folded == ()


def test_the_test_split_is_out_of_reach() -> None:
    closed: list[str] = []

    def cheat() -> Work[None]:
        try:
            yield from Score(Model({}), "test")
        finally:
            closed.append("yes")

    local = Local(Client("c", {}), world("fedit").spec, 1, 1, 0, 1, {})
    with pytest.raises(PermissionError, match="test split"):
        next(numbered(cheat(), local, "train"))
    assert closed == ["yes"]

    def mistaken() -> Work[None]:
        yield "Fit"

    with pytest.raises(TypeError, match="not str"):
        next(numbered(mistaken(), local, "train"))


def test_a_memory_that_is_gone_is_named() -> None:
    fleet = world("local")
    reports = list(rounds(fleet.algorithm, fleet.spec, fleet, total=2, seed=0))
    fleet.inner.stores.clear()
    with pytest.raises(UserError, match="'c0' has no memory of round 2 of run 'run'"):
        list(rounds(fleet.algorithm, fleet.spec, fleet, total=3, seed=0, resume=reports[-1].checkpoint))


def test_a_client_is_not_asked_to_train_before_its_introduction() -> None:
    from fedlora.federation.algorithm import Request
    from fedlora.federation.client import handle

    @dataclass(frozen=True)
    class Introduced(Toy):
        introduction = Mean()

    local = Local(Client("c", {}), SPEC, 1, 1, 0, 1, {})
    request = Request("run", "train", 1, 1, None, None, {})
    with pytest.raises(ValueError, match="before its introduction was acknowledged"):
        next(handle(Introduced(), request, RamMemory("c"), local))


# ---------------------------------------------------------------- bytes and evaluation


def test_bytes_are_those_of_frames() -> None:
    fleet = world("fedit")
    reports = list(rounds(fleet.algorithm, fleet.spec, fleet, total=2, seed=0, sampler=Cohorts(3)))
    payload = fleet.algorithm.broadcast(reports[0].state, fleet.clients["c0"], 1)
    up = len(encode(difference(payload, payload)))
    assert reports[1].bytes == {"up": 3 * up, "down": 3 * len(encode(dict(payload))), "setup_up": 0, "setup_down": 0}
    assert set(reports[0].bytes.values()) == {0}


def test_evaluation_is_lazy_names_its_split_and_serves_strangers() -> None:
    fleet = world("local")
    fleet.inner.strangers = frozenset({"c1"})
    report = list(rounds(fleet.algorithm, fleet.spec, fleet, total=1, seed=0))[-1]
    assert "c1" not in report.folded
    fleet.learner.log.clear()
    lines = evaluate(
        fleet.algorithm, report.checkpoint, fleet, [fleet.clients[id] for id in ("c1", "c0")], total=1, split="holdout"
    )
    assert fleet.learner.log == []
    name, sums = next(lines)
    assert name == "c0"
    assert {job.client for job in fleet.learner.log} == {"c0"}
    assert {job.order.split for job in fleet.learner.log} == {"holdout"}
    assert sums["local"]["accuracy"][1] == 8.0
    assert next(lines)[0] == "c1"
    assert not fleet.stores["c1"].versions  # type: ignore[attr-defined]


# ---------------------------------------------------------------- scale, and the simulator


@dataclass
class Watch:
    """How many of the watched objects were alive at most."""

    alive: list[Any] = field(default_factory=list)
    peak: int = 0

    def see(self, value: Any) -> Any:
        self.alive.append(weakref.ref(value, self.alive.remove))
        self.peak = max(self.peak, len(self.alive))
        return value


SPEC = ModelSpec({}, {}, {"head/bias": (3,)}, ("a", "b"), 2)


@dataclass(frozen=True)
class Toy(Algorithm[Tree, Tree, Tree]):
    """Every client asks for one score and sends ones."""

    payloads: Watch = field(default_factory=Watch)
    updates: Watch = field(default_factory=Watch)

    aggregator = Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        return {"head/bias": torch.zeros(3)}

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        return {"head/bias": self.payloads.see(state["head/bias"].clone())}

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        yield from Score(Model(payload), "train")
        return Update({"head/bias": self.updates.see(torch.ones(3))}, local.examples, {}), memory

    def expects(self, state: Tree, client: Client, round: int, kind: str) -> Mapping[str, Any]:
        return {"head/bias": (3,)}

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return {"head/bias": state["head/bias"] + value["head/bias"].float()}


@dataclass
class Slow:
    """An executor that finishes one job a turn, those of client ``last`` at the very end; ``failing`` ones fail."""

    last: str = ""
    failing: frozenset[str] = frozenset()
    jobs: dict[int, Job] = field(default_factory=dict)
    open: list[int] = field(default_factory=list)
    count: int = 0

    @property
    def idle(self) -> bool:
        return not self.jobs

    def submit(self, job: Job) -> int:
        self.count += 1
        self.jobs[self.count] = job
        return self.count

    def advance(self) -> list[tuple[int, Any]]:
        self.open.append(len(self.jobs))
        ticket = min(self.jobs, key=lambda t: (self.jobs[t].client == self.last, t))
        job = self.jobs.pop(ticket)
        return [(ticket, FloatingPointError("diverged") if job.client in self.failing else {"loss": (0.0, 1.0)})]


def simulator(executor: Slow, count: int, lanes: int, algorithm: Toy | None = None) -> Simulator:
    clients = {f"c{k:04d}": Client(f"c{k:04d}", {}, examples=4) for k in range(count)}
    return Simulator(algorithm or Toy(), SPEC, executor, clients, lambda id: (4, {}), 0, lanes)


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


def request(kind: Any, id: str) -> Any:
    from fedlora.federation.algorithm import Request

    return Request("run", kind, 1, 1, None, None, {"head/bias": torch.zeros(3)})


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


def test_nobody_there() -> None:
    fleet = simulator(Slow(), 0, 2)
    reports = list(rounds(fleet.algorithm, SPEC, fleet, total=2, seed=0))
    assert [report.folded for report in reports] == [(), (), ()]


def test_a_fleet_needs_no_simulator() -> None:
    """The loop knows clients only through ``Fleet``."""

    class Canned:
        def available(self, round: int) -> Sequence[Client]:
            return [Client("a", {}), Client("b", {})]

        def ask(self, requests: Mapping[str, Any]) -> Iterator[tuple[str, Reply | None]]:
            for name in requests:
                asked = requests[name]
                arrays = {"head/bias": torch.full((3,), 2.0 if name == "a" else 4.0)}
                yield name, Reply(asked.run_id, asked.kind, asked.round, Update(arrays, 1.0, {"n": (1.0, 1.0)}))

    report = list(rounds(Toy(), SPEC, Canned(), total=1, seed=0))[-1]
    assert torch.equal(report.state["head/bias"], torch.full((3,), 3.0))
    assert report.sums == {"n": (2.0, 2.0)}
