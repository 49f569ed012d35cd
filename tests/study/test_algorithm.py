"""From a run file to an algorithm, and back: what is written out is the same algorithm wherever it is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.algorithms import ALGORITHMS
from fedlora.study.algorithm import build, stated
from fedlora.study.config import RunConfig, parse

OWN = """
from dataclasses import dataclass, field
from fedlora.algorithms.fedit import FedIT
from fedlora.federation.orders import Optimizer, Training

@dataclass(frozen=True)
class Ordered(FedIT):
    '''Its rates are in an order of their own.'''
    training: Training = field(
        default_factory=lambda: Training(optimizer=Optimizer(lr=0.1, lrs=(("head", 0.2), ("norm", 0.3))))
    )
"""


def config(name: str, **training: Any) -> RunConfig:
    model, data = {"name": "minilm", "task": "text-classification"}, {"train": "x.csv", "text": "t", "label": "l"}
    return parse({"model": model, "data": data, "algorithm": {"name": name}, "training": training}, "test")


@pytest.mark.parametrize("training", [{}, {"lr": 0.05}, {"lr": 0.05, "head_lr": 0.05}, {"head_lr": 0.07, "steps": 3}])
@pytest.mark.parametrize("name", [*sorted(ALGORITHMS), "own"])
def test_a_resolved_run_file_is_the_same_algorithm(name: str, training: dict[str, Any], tmp_path: Path) -> None:
    """An actor reads it, and compares its algorithm with the head's, word for word."""
    if name == "own":
        (tmp_path / "own.py").write_text(OWN)
        name = f"{tmp_path / 'own.py'}:Ordered"
    given = config(name, **training)
    first = build(given)
    resolved = stated(given, first)
    assert repr(build(resolved)) == repr(first)
    assert stated(resolved, build(resolved)) == resolved
