"""From a run file to an algorithm, and back: what is written out is the same algorithm wherever it is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.algorithms import ALGORITHMS
from fedlora.errors import UserError
from fedlora.study.algorithm import build, stated
from fedlora.study.config import RunConfig, load, parse
from fedlora.study.run import run
from study import tiny

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


MISTAKEN = """
from dataclasses import dataclass
from fedlora.algorithms.fedit import FedIT
from fedlora.federation.algorithm import Algorithm
from fedlora.federation.orders import Fit, Model

@dataclass(frozen=True)
class Half(Algorithm):
    def server_init(self, spec, seed):
        return {}

@dataclass(frozen=True)
class Silent(FedIT):
    def client_update(self, payload, memory, local):
        return {}

@dataclass(frozen=True)
class Wrong(FedIT):
    def client_update(self, payload, memory, local):
        yield from Fit(Model(payload), ("lora",), epochs=1)
"""


def test_mistakes_in_an_own_file_name_it(tmp_path: Path) -> None:
    file = tiny.run_file(tmp_path, training="rounds = 1\n")
    (tmp_path / "mine.py").write_text(MISTAKEN)
    said = "it lacks aggregator, broadcast, client_update, expects, server_update, personalize"
    with pytest.raises(UserError, match=rf"mine.py:Half'.*: {said}\n"):
        run(load(file, ["algorithm.name=mine.py:Half"]), out=tmp_path / "half")
    for name, message in (("Silent", "is a generator .*, not a dict"), ("Wrong", "'lora' selects nothing")):
        with pytest.raises(Exception, match=message) as raised:
            run(load(file, [f"algorithm.name=mine.py:{name}"]), out=tmp_path / name)
        [note] = raised.value.__notes__
        assert f"mine.py:{name}' was running" in note
