"""The class prior, by another route: client by client."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.study.summary import class_prior

SPLITS = ("fit", "holdout", "test")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4))
def test_class_prior_is_each_clients_most_frequent_training_label(seed: int, clients: int, labels: int) -> None:
    draw = np.random.default_rng(seed)
    names = np.array(["b", "a", "d", "c"])[:labels]
    rows = names[draw.integers(0, labels, 60)]
    owner, part = draw.integers(0, clients, 60), draw.integers(0, 3, 60)
    who = {
        f"c{i}": {name: np.flatnonzero((owner == i) & (part == k)) for k, name in enumerate(SPLITS)}
        for i in range(clients)
    }
    expected = []
    for own in who.values():
        trained = [str(rows[i]) for name in SPLITS[:2] for i in own[name]]
        if trained and len(own["test"]):
            most = max(sorted(set(trained)), key=trained.count)
            expected.append(np.mean([str(rows[i]) == most for i in own["test"]]))
    found = class_prior(rows, who)
    if expected:
        assert found["mean"] == pytest.approx(np.mean(expected), abs=1e-12)
        assert found["std"] == pytest.approx(np.std(expected), abs=1e-12)
    else:
        assert found["mean"] is None
