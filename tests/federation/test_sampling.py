"""Cohorts are pure functions of (seed, round) and who is there."""

from __future__ import annotations

import pytest

from fedlora.errors import UserError
from fedlora.federation.sampling import Cohorts, cohort
from fedlora.federation.spec import Client

CLIENTS = [Client(f"c{k:02d}", {}) for k in range(20)]


def test_counts_and_shares() -> None:
    sizes = [len(cohort(CLIENTS, 1, 0, count)) for count in (None, 1, 7, 99, 1.0, 0.5, 0.01, 0.125)]
    assert sizes == [20, 1, 7, 20, 20, 10, 1, 3]
    assert cohort([], 1, 0, 0.5) == []
    for wrong in (0, -1, 0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="a cohort of"):
            cohort(CLIENTS, 1, 0, wrong)


def test_everyone_is_drawn_equally_often() -> None:
    drawn = [client.id for round in range(400) for client in cohort(CLIENTS, round, 3, 5)]
    counts = [drawn.count(client.id) for client in CLIENTS]
    assert sum(counts) == 2000
    assert min(counts) > 60  # expected 100, standard deviation 9
    assert max(counts) < 140


def test_pure_and_sorted() -> None:
    draw = Cohorts(0.4)
    assert draw(CLIENTS, 3, 1) == draw(list(reversed(CLIENTS)), 3, 1) == sorted(draw(CLIENTS, 3, 1), key=lambda c: c.id)
    assert draw(CLIENTS, 3, 1) != draw(CLIENTS, 4, 1)
    assert draw(CLIENTS, 3, 1) != draw(CLIENTS, 3, 2)
