"""Nothing wrong is folded, nothing right is refused, and every refusal has its own name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance.table import world
from federation.doubles import SPEC, Slow, Toy, simulator
from fedlora.federation.admission import Limits, Refusal, fault, norm, oversized
from fedlora.federation.algorithm import Reply, Update
from fedlora.federation.exchange import Asked
from fedlora.federation.rounds import rounds
from fedlora.federation.spec import Client, Shape
from fedlora.federation.wire import decode, encode, same

SHAPES: dict[str, Shape | None] = {"q/A": (-1, 7), "q/B": (5, -1), "head/weight": (3, 4), "rows": None}
CLIENT = Client("c", {"q": 4}, examples=90)


def honest(rank: int = 3, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = {"q/A": (rank, 7), "q/B": (5, rank), "head/weight": (3, 4), "rows": (2, 6)}
    return {name: scale * torch.randn(size, generator=draw) for name, size in sizes.items()}


def reason(arrays: Mapping[str, Tensor], weight: float = 1.0, sums: Any = None, **options: Any) -> str | None:
    found = fault(Update(arrays, weight, sums or {}), SHAPES, CLIENT, dtype=torch.float32, **options)
    return None if found is None else found.reason


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 10**6), st.floats(1e-6, 90.0), st.floats(1e-3, 1e3))
def test_what_is_honest_is_let_in(rank: int, seed: int, weight: float, scale: float) -> None:
    arrays = honest(rank, seed, scale)
    size = math.sqrt(sum(float(v) ** 2 for value in arrays.values() for v in value.flatten()))
    assert reason(arrays, weight, {"train_loss": (1.5, 2.0)}, max_norm=size * 1.0001) is None
    assert reason(arrays, weight, max_norm=size * 0.9999) == "norm"


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.integers(0, 10**6),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.data(),
)
def test_one_number_that_is_not_finite_is_found_wherever_it_hides(
    name: str, seed: int, bad: float, data: st.DataObject
) -> None:
    arrays = honest(seed=seed)
    arrays[name].view(-1)[data.draw(st.integers(0, arrays[name].numel() - 1))] = bad
    assert reason(arrays) == "not finite"


def test_large_numbers_are_finite() -> None:
    arrays = {"x": torch.full((2, 3), 1.7e308, dtype=torch.float64), "y": torch.full((5,), 3e38)}
    expected = {name: tuple(value.shape) for name, value in arrays.items()}
    assert fault(Update(arrays, 1.0, {}), expected, CLIENT) is None


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1), st.sets(st.text(max_size=5), max_size=3))
def test_a_missing_or_surplus_name_is_refused(dropped: set[str], added: set[str]) -> None:
    kept = {name: value for name, value in honest().items() if name not in dropped}
    assert reason(kept) == "names"
    if surplus := added - set(SHAPES):
        assert reason({**honest(), **{name: torch.zeros(1) for name in surplus}}) == "names"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("head/weight", torch.zeros(4, 3), "shape"),
        ("head/weight", torch.zeros(3, 4, 1), "shape"),
        ("q/A", torch.zeros(3, 8), "shape"),
        ("q/A", torch.zeros(5, 7), "rank"),  # above the client's rank of 4
        ("q/A", torch.zeros(2, 7), "rank"),  # B has rank 3
        ("q/B", torch.zeros(5, 5), "rank"),
        ("head/weight", torch.zeros(3, 4, dtype=torch.float64), "type"),
        ("head/weight", torch.zeros(3, 4, dtype=torch.bfloat16), "type"),
    ],
)
def test_each_fault_has_its_name(name: str, value: Tensor, expected: str) -> None:
    assert reason({**honest(), name: value}) == expected


@pytest.mark.parametrize("weight", [0.0, -1.0, 90.001, math.inf, math.nan, 1e308])
def test_a_weight_beyond_the_registered_examples_is_refused(weight: float) -> None:
    assert reason(honest(), weight) == "weight"


def test_other_faults() -> None:
    assert fault(None, SHAPES, CLIENT) == Refusal("empty", "no update")
    assert reason(honest(), sums={"train_loss": (math.nan, 1.0)}) == "not finite"
    many = {f"{i:03}" + "x" * 500: torch.zeros(1) for i in range(500)}
    assert len(str(fault(Update(many, 1.0, {}), SHAPES, CLIENT))) < 1000  # a log line, whatever a stranger sends


# ---------------------------------------------------------------- norms over rounds


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 100.0), max_size=5), max_size=7), st.integers(1, 4))
def test_the_limit_is_a_multiple_of_the_median_of_the_last_rounds(norms: list[list[float]], window: int) -> None:
    limits = Limits(factor=10.0, first=77.0, window=window)
    kept: list[list[float]] = []
    for one in norms:
        kept = limits.kept(kept, one)
    heard = [one for one in norms if one][-window:]
    assert [sorted(one) for one in heard] == kept
    assert limits.norm(kept) == (10.0 * median([x for one in heard for x in one]) if heard else 77.0)


class Loud(Toy):
    """Ones, but one client shouts from a round on."""

    def client_update(self, payload: Any, memory: Any, local: Any) -> Iterator[Any]:
        update, memory = yield from super().client_update(payload, memory, local)
        if local.client.id == "c0001" and local.round >= 3:
            update = replace(update, arrays={"head/bias": update.arrays["head/bias"] * 1001.0})
        return update, memory


def test_a_thousand_times_the_median_is_dropped_and_a_resumed_server_still_knows_the_median() -> None:
    fleet = simulator(Slow(), 5, 1, Loud())
    reports = list(rounds(fleet.algorithm, SPEC, fleet, total=4, seed=0, limits=Limits()))
    assert [set(report.rejected) for report in reports] == [set(), set(), set(), {"c0001"}, {"c0001"}]
    assert reports[3].rejected["c0001"].startswith("norm: ")
    assert len(reports[3].folded) == 4
    saved = decode(encode(reports[2].checkpoint))
    assert saved["norms"] == {"train": [[pytest.approx(math.sqrt(3))] * 5] * 2}
    fleet = simulator(Slow(), 5, 1, Loud())
    begun = rounds(fleet.algorithm, SPEC, fleet, total=4, seed=0, limits=Limits())
    assert same([next(begun).checkpoint for _ in range(3)][-1], saved)
    again = list(rounds(fleet.algorithm, SPEC, fleet, total=4, seed=0, limits=Limits(), resume=saved))
    assert [set(report.rejected) for report in again] == [{"c0001"}, {"c0001"}]
    assert same(again[-1].state, reports[-1].state)


def test_the_first_round_has_an_absolute_limit() -> None:
    fleet = simulator(Slow(), 3, 1, Toy())
    quiet = list(rounds(fleet.algorithm, SPEC, fleet, total=1, seed=0, limits=Limits(first=1.7)))[-1]
    assert set(quiet.rejected) == {"c0000", "c0001", "c0002"}
    assert quiet.folded == ()


@pytest.mark.parametrize("algorithm", ["fedit", "fdlora", "flexlora", "ce-lora", "pfedlora", "fedproto"])
def test_the_limits_change_nothing_for_the_honest(algorithm: str) -> None:
    ends: list[Any] = []
    for limits in (None, Limits()):
        fleet = world(algorithm)
        report = list(rounds(fleet.algorithm, fleet.spec, fleet, total=2, seed=0, limits=limits))[-1]
        assert report.rejected == {}
        ends.append(report.state)
    assert same(*ends)


# ---------------------------------------------------------------- messages


def test_a_gigabyte_is_refused_by_its_size() -> None:
    assert oversized(Limits().message, Limits()) is None
    assert getattr(oversized(2**30, Limits()), "reason", None) == "size"


def test_a_second_answer_within_a_round_is_dropped_by_the_loop_as_well() -> None:
    inner = simulator(Slow(), 3, 1, Toy())

    class Echoing:
        def available(self, round: int) -> Any:
            return inner.available(round)

        def ask(self, requests: Asked) -> Iterator[tuple[str, Reply | None]]:
            for name, reply in inner.ask(requests):
                yield name, reply
                yield name, reply

    plain = list(rounds(inner.algorithm, SPEC, inner, total=2, seed=0))[-1]
    twice = list(rounds(inner.algorithm, SPEC, Echoing(), total=2, seed=0))[-1]
    assert same(plain.state, twice.state)
    assert norm(twice.state) == pytest.approx(2 * math.sqrt(3))
