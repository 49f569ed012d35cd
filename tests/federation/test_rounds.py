"""The loop's machinery: order, refusals, versions, bytes, and what it holds at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.table import world
from federation.doubles import SPEC, Slow, Toy, simulator
from fedlora.adapters.algebra import difference
from fedlora.errors import UserError
from fedlora.federation.admission import fault
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Reply, Request, Update
from fedlora.federation.client import handle, numbered
from fedlora.federation.exchange import in_order, once
from fedlora.federation.memory import RamMemory
from fedlora.federation.orders import Model, Score, Work
from fedlora.federation.rounds import evaluate, rounds
from fedlora.federation.sampling import Cohorts
from fedlora.federation.spec import Client, Local, ModelSpec, Tree
from fedlora.federation.wire import encode

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
    program = cheat()
    with pytest.raises(PermissionError, match="test split"):
        next(numbered(program, local, "train"))
    assert closed == ["yes"]  # while somebody still holds it

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
    @dataclass(frozen=True)
    class Introduced(Toy):
        introduction = Mean()

    local = Local(Client("c", {}), SPEC, 1, 1, 0, 1, {})
    request = Request("run", "train", 1, 1, None, None, {})
    with pytest.raises(ValueError, match="before its introduction was acknowledged"):
        next(handle(Introduced(), request, RamMemory("c"), local))


def test_a_first_memory_is_a_function_of_the_client_alone() -> None:
    """The same orders and streams at an introduction in any round, before a first training and for a stranger."""
    seen: list[tuple[int, int]] = []

    @dataclass(frozen=True)
    class Curious(Toy):
        def client_init(self, local: Local) -> Work[tuple[None, Tree]]:
            yield from Score(Model({}), "train")
            seen.append((local.round, local.seed("own")))
            return None, {}

    streams = []
    for kind, round in (("introduce", 0), ("introduce", 6), ("train", 3), ("evaluate", 9)):
        local = Local(Client("c", {}), SPEC, round, 9, 5, 1, {})
        request = Request("run", kind, round, 9, None, None, {"head/bias": torch.zeros(3)})  # type: ignore[arg-type]
        program = handle(Curious(), request, RamMemory("c"), local)
        (job,) = next(program)
        streams.append(job.seed)
        with contextlib.suppress(StopIteration, NotImplementedError):
            program.send(({"loss": (0.0, 1.0)},))
        program.close()
    assert len(set(streams)) == 1
    assert seen == [seen[0]] * 4


def test_only_the_checkpoint_that_was_saved_moves_what_clients_keep() -> None:
    """``saved`` of an earlier report may come late; clients are told of that report's round, not of the latest."""
    toy, asked = Toy(), list[tuple[int, int | None, int | None]]()
    fleet = simulator(Slow(), 1, 1, toy)
    ask = fleet.ask

    def noted(requests: Any) -> Iterator[Any]:
        one = requests["c0000"]
        asked.append((one.round, one.base_version, one.keep_from))
        return ask(requests)

    fleet.ask = noted  # type: ignore[method-assign]
    loop = rounds(toy, SPEC, fleet, total=5, seed=0)
    reports = [next(loop) for _ in range(4)]
    reports[2].saved()
    next(loop)
    reports[3].saved()
    next(loop)
    assert asked == [(1, None, None), (2, 1, None), (3, 2, None), (4, 3, 2), (5, 4, 3)]


@dataclass(frozen=True)
class Views(Toy):
    """Everything it serves, sends and keeps is a transposed view."""

    layouts: list[bool] = field(default_factory=list)

    def server_init(self, spec: ModelSpec, seed: int) -> Any:
        return {"nested": [{"x": torch.zeros(2, 3).T}]}

    def broadcast(self, state: Any, client: Client, round: int) -> Tree:
        self.layouts.append(state["nested"][0]["x"].is_contiguous())
        return {"x": state["nested"][0]["x"].T.contiguous().T}

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        yield from Score(Model({}), "train")
        self.layouts.extend(value.is_contiguous() for value in (*payload.values(), *memory.values()))
        return Update({"x": torch.ones(2, 3).T}, 1.0, {}), {"x": torch.ones(2, 3).T}

    def expects(self, state: Any, client: Client, round: int, kind: str) -> Mapping[str, Any]:
        return {"x": (3, 2)}

    def server_update(self, state: Any, value: Tree, round: int) -> Any:
        return {"nested": ({"x": torch.ones(2, 3).T},)}


def test_everybody_computes_with_the_layout_that_bytes_would_give() -> None:
    """Else a kernel rounds differently after a wire or a resume."""
    algorithm, arrived = Views(), list[bool]()
    fleet = simulator(Slow(), 2, 1, algorithm)
    ask = fleet.ask

    def looked(requests: Any) -> Iterator[Any]:
        for name, reply in ask(requests):
            arrived.append(reply.update.arrays["x"].is_contiguous())  # type: ignore[union-attr]
            yield name, reply

    fleet.ask = looked  # type: ignore[method-assign]
    report = list(rounds(algorithm, SPEC, fleet, total=2, seed=0))[-1]
    assert isinstance(report.state["nested"], list)
    assert len(algorithm.layouts) == 4 + 4 + 2
    assert all(algorithm.layouts)
    assert len(arrived) == 4
    assert all(arrived)


def test_what_an_algorithm_objects_to_is_refused_by_name_and_the_run_goes_on() -> None:
    """CE-LoRA would compute with what a client says of its features."""
    fleet = world("ce-lora")
    ask = fleet.ask

    def tampered(requests: Any) -> Iterator[Any]:
        for name, reply in ask(requests):
            if reply is not None and reply.kind == "introduce" and name == "c1":
                arrays = {**reply.update.arrays, "variances": -reply.update.arrays["variances"]}  # type: ignore[union-attr]
                reply = replace(reply, update=replace(reply.update, arrays=arrays))
            yield name, reply

    fleet.ask = tampered  # type: ignore[method-assign]
    reports = list(rounds(fleet.algorithm, fleet.spec, fleet, total=2, seed=0))
    assert dict(reports[0].rejected) == {"c1": "meaning: variances is not positive"}
    assert set(reports[2].folded) == set(fleet.clients) - {"c1"}
    assert "c1" not in reports[2].state["weights"]


# ---------------------------------------------------------------- bytes and evaluation


def test_bytes_are_those_of_frames() -> None:
    fleet = world("fedit")
    reports = list(rounds(fleet.algorithm, fleet.spec, fleet, total=2, seed=0, sampler=Cohorts(3)))
    payload = fleet.algorithm.broadcast(reports[0].state, fleet.clients["c0"], 1)
    up = len(encode(difference(payload, payload)))
    assert reports[1].bytes == {"up": 3 * up, "down": 3 * len(encode(dict(payload))), "setup_up": 0, "setup_down": 0}
    assert set(reports[0].bytes.values()) == {0}


def test_changes_of_the_base_travel_once() -> None:
    """FLoRA's payload holds every merge so far; what is sent are those that a client has not seen."""
    fleet = world("flora")
    everyone = list(rounds(fleet.algorithm, fleet.spec, fleet, total=4, seed=0))[1:]
    assert everyone[0].bytes["down"] < everyone[1].bytes["down"]
    assert len({report.bytes["down"] for report in everyone[1:]}) == 1
    missed = world("flora")  # the last round asks everybody, of whom c0 alone took part before
    reports = list(
        rounds(
            missed.algorithm, missed.spec, missed, total=4, seed=0, sampler=lambda c, t, s: c[: 1 if t < 4 else None]
        )
    )
    assert reports[1].bytes["down"] < reports[2].bytes["down"] == reports[3].bytes["down"]
    assert reports[4].bytes["down"] > len(missed.clients) * reports[3].bytes["down"]


def test_evaluation_is_lazy_names_its_split_and_serves_strangers() -> None:
    fleet = world("local")
    fleet.inner.strangers = frozenset({"c1"})
    report = list(rounds(fleet.algorithm, fleet.spec, fleet, total=1, seed=0))[-1]
    assert "c1" not in report.folded
    fleet.learner.log.clear()
    both = [fleet.clients[id] for id in ("c1", "c0")]
    lines = evaluate(fleet.algorithm, report.checkpoint, fleet, both, total=1, splits=("holdout", "fit"))
    assert fleet.learner.log == []
    name, sums = next(lines)
    assert name == "c0"
    assert {job.client for job in fleet.learner.log} == {"c0"}
    assert {job.order.split for job in fleet.learner.log} == {"holdout", "fit"}
    assert sums["local"]["accuracy"][1] == 8.0
    assert sums["local"]["fit/accuracy"][1] > 8.0
    assert next(lines)[0] == "c1"
    assert not fleet.stores["c1"].versions  # type: ignore[attr-defined]


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
