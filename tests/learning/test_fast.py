"""Measuring the compute type leaves the base as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.learning.backbone import load_backbone
from fedlora.learning.fast import ENOUGH, LANES, STEPS, _learner, _seconds, cast
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


@pytest.mark.parametrize("kept", [200, 3])
def test_a_measured_step_has_enough_tokens_and_every_lane_a_share(kept: int) -> None:
    store = examples(kept)
    base = backbone(dtype=torch.float32)
    found = _learner(base, TextClassification(LABELS), store, spec_of(base, torch.float32), 1024)
    rows = np.concatenate([found.units(str(k), "fit") for k in range(LANES)])
    assert len(set(rows.tolist())) == len(rows)
    tokens = int(store.lengths[rows].sum())
    assert tokens > 0.7 * ENOUGH if kept == 200 else len(rows) == kept
    seen: list[int] = []
    groups = found.groups
    found.groups = lambda *given: seen.append(sum(map(len, given[2].values()))) or groups(*given)  # type: ignore[method-assign]
    assert _seconds(found) > 0
    assert seen == [len(rows)] * STEPS
