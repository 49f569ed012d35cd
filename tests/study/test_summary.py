"""The class prior, by another route: client by client; and what people are told of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedlora.study.report import table
from fedlora.study.run import Result
from fedlora.study.summary import UNSEEN_PRIOR, Metric, class_prior, summarise

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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_diverged_has_no_score_and_neither_has_a_mean_over_it(bad: float) -> None:
    sums = {
        "a": {"own": {"bits_per_byte": (8.0, 4.0)}, "global": {"bits_per_byte": (8.0, 4.0)}},
        "b": {"own": {"bits_per_byte": (bad, 4.0)}, "global": {"bits_per_byte": (4.0, 4.0)}},
    }
    found = summarise(sums, Metric("bits_per_byte", higher_is_better=False), single=True)
    assert found["personal"]["mean"] is found["personal"]["worst_decile"] is None
    assert found["personal"]["per_client"] == {"a": 2.0, "b": None}
    assert found["personal"]["variants"]["global"]["mean"] == 1.5
    assert found["global"]["score"] == 1.5
    sums["a"]["global"] = sums["b"]["own"]
    assert summarise(sums, Metric("bits_per_byte", higher_is_better=False), single=True)["global"]["score"] is None


@pytest.mark.parametrize(
    ("prior", "said"),
    [
        ({"class_prior": {"mean": 0.25, "std": 0.0, "worst_decile": 0.25}}, "most frequent label): 0.2500"),
        ({"class_prior": UNSEEN_PRIOR}, "most frequent label): not known: the labels are at the sites"),
        ({}, None),  # a language model has no classes
    ],
)
def test_the_class_prior_is_shown_or_said_to_be_unknown(prior: dict[str, Any], said: str | None) -> None:
    summary = {
        "algorithm": "fedit",
        "metric": "accuracy",
        "higher_is_better": True,
        "personal": {"variants": {}},
        "global": None,
        "bytes": {"up": 0, "down": 0, "setup_up": 0, "setup_down": 0},
        "clients": 2,
        "rounds": 1,
        "seconds": 1.0,
        "client_steps_per_second": 1.0,
    }
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table(Result(Path("run"), {**summary, **prior}, ())))
    assert said in shown.get() if said else "prior" not in shown.get()
