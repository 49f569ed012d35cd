"""Groups of sequences: nothing lost, the budget kept, no cheaper cut left out, little padding."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.learning.batches import PASS, Computed, Steady, borders, cut, rectangle

RULES = {"any shape": rectangle, "few shapes": Steady(70)}
lengths_of = st.lists(st.integers(1, 70), min_size=1, max_size=9)


def price(sizes: np.ndarray, runs: list[tuple[int, int]], budget: int, rule: Computed) -> float:
    total = 0.0
    for start, stop in runs:
        tokens = int(rule(np.array([stop - start]), sizes[stop - 1 : stop])[0])
        total += math.inf if tokens > budget and stop - start > 1 else tokens + PASS
    return total


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@settings(deadline=None, max_examples=40)
@given(lengths_of, st.integers(1, 600))
def test_no_other_cut_is_cheaper(rule: Computed, lengths: list[int], budget: int) -> None:
    sizes = np.sort(np.array(lengths))
    every = [
        list(pairwise([0, *inner, len(sizes)]))
        for count in range(len(sizes))
        for inner in combinations(range(1, len(sizes)), count)
    ]
    found = borders(sizes, budget, rule)
    assert price(sizes, found, budget, rule) == min(price(sizes, runs, budget, rule) for runs in every)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 600), st.integers(1, 600))
def test_batches_of_few_shapes_grow_little(rows: int, longest: int, most: int) -> None:
    many, length = map(int, Steady(most).shape(rows, longest))
    limit = max(most, longest)
    assert many >= rows
    assert longest <= length <= limit
    assert many * length % 64 == 0 or length == limit
    shapes = [(-(-longest // g) * g, rows + -rows % (64 // g)) for g in (8, 16, 32, 64)]
    inside = [a * b for a, b in shapes if a <= limit]
    assert many * length <= min([*inside, rows * limit + 64 + limit] if len(inside) < 4 else inside)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@settings(deadline=None, max_examples=40)
@given(st.lists(lengths_of, min_size=1, max_size=6), st.integers(1, 600))
def test_every_unit_is_in_one_group_with_its_lane(rule: Computed, lanes: list[list[int]], budget: int) -> None:
    lengths = np.array([length for lane in lanes for length in lane])
    ends = np.cumsum([len(lane) for lane in lanes])
    work = {k: np.arange(end - len(lane), end)[::-1] for k, (end, lane) in enumerate(zip(ends, lanes))}
    groups = cut(work, lengths, budget, partial(borders, computed=rule))
    seen = [(int(k), int(p), int(u)) for g in groups for k, p, u in zip(g.lanes, g.places, g.units)]
    assert sorted(seen) == sorted((k, p, int(u)) for k, units in work.items() for p, u in enumerate(units))
    for group in groups:
        tokens = int(rule(np.array([len(group)]), np.array([lengths[group.units].max()]))[0])
        assert len(group) == 1 or tokens <= budget
        assert [lane for lane, _, _ in group.segments] == sorted(set(group.lanes.tolist()))
        assert all((group.lanes[start:stop] == lane).all() for lane, start, stop in group.segments)


def texts(lanes: int, seed: int) -> np.ndarray:
    """Lengths like those of short texts, eight a lane: log-normal with mean 24, between 4 and 128."""
    draw = np.random.default_rng(seed).lognormal(math.log(24) - 0.7**2 / 2, 0.7, lanes * 8)
    return draw.round().clip(4, 128).astype(np.int64)


@pytest.mark.parametrize(("lanes", "most"), [(8, 0.19), (16, 0.15), (32, 0.11)])
def test_lanes_leave_little_padding(lanes: int, most: float) -> None:
    real = computed = 0
    for seed in range(20):
        lengths = texts(lanes, seed)
        groups = cut({k: np.arange(8 * k, 8 * k + 8) for k in range(lanes)}, lengths, 1024)
        computed += sum(len(g) * int(lengths[g.units].max()) for g in groups)
        real += int(lengths.sum())
    assert 1 - real / computed < most
