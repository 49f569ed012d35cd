"""The clients' ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.profiles import DISTRIBUTIONS, RankProfile, largest_remainder, ranks
from fedlora.errors import UserError

IDS = [f"c{i}" for i in range(400)]


def test_numbers_and_lists() -> None:
    assert ranks(8, ["a", "b"], seed=0) == {"a": RankProfile(8, 8), "b": RankProfile(8, 8)}
    mixed = ranks([RankProfile(2, 9), 4], IDS[:3], seed=0)
    assert list(mixed.values()) == [RankProfile(2, 9), RankProfile(4, 4), RankProfile(2, 9)]
    assert [p.attention for p in ranks((2, 4, 8), IDS[:5], seed=0).values()] == [2, 4, 8, 2, 4]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("uniform", (100, 100, 100, 100)),
        ("heavy-tail-light", (340, 20, 20, 20)),
        ("heavy-tail-strong", (20, 20, 20, 340)),
        ("normal", (23, 177, 177, 23)),
        ("heavy-tail-light-released", (320, 20, 20, 40)),
        ("heavy-tail-strong-released", (20, 20, 40, 320)),
    ],
)
def test_the_papers_shares(name: str, counts: tuple[int, ...]) -> None:
    large = Counter(ranks(name, IDS, seed=1).values())
    types = [RankProfile(8, 8), RankProfile(30, 30), RankProfile(30, 200), RankProfile(200, 200)]
    assert [large[kind] for kind in types] == list(counts)
    small = Counter(ranks(f"{name}-small", IDS, seed=1).values())
    assert [small[RankProfile(r, r)] for r in (2, 4, 8, 16)] == list(counts)


def test_profiles_are_shuffled_by_the_seed() -> None:
    one, two, three = (list(ranks("uniform-small", IDS, seed).values()) for seed in (1, 1, 2))
    assert one == two != three
    assert one != sorted(one, key=lambda profile: profile.mlp)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 500))
def test_largest_remainder_is_within_one_of_the_share(shares: list[float], total: int) -> None:
    counts = largest_remainder(shares, total)
    assert counts.sum() == total
    assert np.abs(counts - np.array(shares) * total / sum(shares)).max() < 1 + 1e-6


def test_wrong_ranks_name_the_nearest() -> None:
    assert len(DISTRIBUTIONS) == 12
    with pytest.raises(UserError, match=r"no distribution 'unifrom' \(nearest: 'uniform'\)"):
        ranks("unifrom", IDS, seed=0)
    for wrong in (0, [], [4, -1], [True], [2.5]):
        with pytest.raises(UserError, match="whole numbers from 1"):
            ranks(wrong, IDS, seed=0)
