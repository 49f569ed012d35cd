"""Measuring the compute type leaves the base as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fedlora.learning.examples import Examples
from fedlora.learning.fast import ENOUGH, STEPS, _learner, _seconds, cast
from fedlora.learning.loading import load_backbone
from fedlora.learning.tasks import TextClassification
from learning.worlds import LABELS, backbone, examples, spec_of


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def test_a_cast_base_comes_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    backbone = load_backbone(Small(), "text-classification", labels=("a", "b", "c"), targets=["body.0"])
    before = {name: value.clone() for name, value in backbone.module.state_dict().items()}
    with cast(backbone, torch.bfloat16):
        assert backbone.dtype == torch.bfloat16
    after = backbone.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(not torch.equal(v, v.bfloat16().to(v.dtype)) for v in before.values() if v.is_floating_point())


def units_of_steps(store: Examples) -> list[np.ndarray]:
    """What all lanes take in each measured step."""
    base = backbone(dtype=torch.float32)
    found = _learner(base, TextClassification(LABELS), store, spec_of(base, torch.float32), 1024)
    seen: list[np.ndarray] = []
    groups = found.groups
    found.groups = lambda *given: seen.append(np.concatenate(list(given[2].values()))) or groups(*given)  # type: ignore[method-assign]
    assert _seconds(found) > 0
    assert len(seen) == STEPS
    return seen


def test_a_measured_step_of_short_texts_has_enough_tokens() -> None:
    store = examples(200)
    for units in units_of_steps(store):
        assert len(set(units.tolist())) == len(units)
        assert 0.7 * ENOUGH < store.lengths[units].sum() < 1.5 * ENOUGH


def test_where_there_are_few_texts_a_step_has_them_all() -> None:
    assert [sorted(units.tolist()) for units in units_of_steps(examples(3))] == [[0, 1, 2]] * STEPS


def test_a_measured_step_of_long_documents_has_a_few_of_their_windows() -> None:
    """Thousands of tokens a row: more of them say nothing more, and take minutes."""
    windows = {"lengths": np.full(1000, 30), "offsets": 30 * np.arange(1001), "tokens": np.full(30_000, 5, np.int32)}
    store = replace(examples(1000), rows=np.arange(0, 1001, 100), **windows)
    for units in units_of_steps(store):
        assert store.lengths[units].sum() < 1.5 * ENOUGH
