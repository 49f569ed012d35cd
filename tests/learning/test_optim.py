"""One optimiser for the rows of all lanes is what separate ones would be."""

from __future__ import annotations

import pytest
import torch

from fedlora.federation.orders import Optimizer
from fedlora.learning.optim import Stepper

BLOCKS = [("q/A", 0, 15), ("q/B", 15, 27), ("head/weight", 27, 40), ("head/bias", 40, 43)]
SETTINGS = [
    Optimizer(lr=0.02, weight_decay=0.1, lrs=(("head", 0.005),), no_decay=("head/bias",)),
    Optimizer("sgd", lr=0.02, momentum=0.9, lrs=(("B", 0.1),)),
]


def separate(given: Optimizer, values: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Torch's on the parameters of one lane, as its documentation has it."""
    rates = {"q/A": given.lr, "q/B": dict(given.lrs).get("B", given.lr)}
    rates |= dict.fromkeys(("head/weight", "head/bias"), dict(given.lrs).get("head", given.lr))
    groups = [
        {
            "params": [value],
            "lr": rates[key],
            "weight_decay": 0.0 if key in given.no_decay else given.weight_decay,
        }
        for (key, _, _), value in zip(BLOCKS, values, strict=True)
    ]
    return torch.optim.AdamW(groups) if given.name == "adamw" else torch.optim.SGD(groups, momentum=given.momentum)


@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: given.name)
def test_lanes_that_start_and_stop_step_as_if_each_were_alone(given: Optimizer) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(3, 43, generator=draw, dtype=torch.float64)
    grads = torch.zeros_like(values)
    stepper = Stepper(given, BLOCKS, values, grads)
    alone: dict[int, tuple[list[torch.Tensor], torch.optim.Optimizer]] = {}

    def begin(lane: int) -> None:
        values[lane] = torch.randn(43, generator=draw, dtype=torch.float64)
        stepper.forget(lane)
        own = [values[lane, start:stop].clone().requires_grad_() for _, start, stop in BLOCKS]
        alone[lane] = own, separate(given, own)

    for lane in range(3):
        begin(lane)
    for turn, stepping in enumerate([{0, 1, 2}, {0, 2}, {0, 2}, {0, 1, 2}, {1}, {0, 1, 2}]):
        if turn == 3:
            begin(2)  # the next job takes the lane: nothing is left of the moments and the count of steps
        grads.copy_(torch.randn(3, 43, generator=draw, dtype=torch.float64))
        stepper.step(stepping)
        for lane in stepping:
            own, optimizer = alone[lane]
            for value, (_, start, stop) in zip(own, BLOCKS, strict=True):
                value.grad = grads[lane, start:stop].clone()
            optimizer.step()
        for lane, (own, _) in alone.items():
            torch.testing.assert_close(values[lane], torch.cat(own).detach(), rtol=1e-12, atol=1e-12)
