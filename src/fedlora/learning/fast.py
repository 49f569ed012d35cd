"""Which type the base computes in: float32, the exact mode, or bfloat16 where it is faster and accurate enough."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fedlora.federation.client import Job
from fedlora.federation.orders import Features, Fit, Model, Optimizer
from fedlora.federation.spec import ModelSpec
from fedlora.learning.backbone import Backbone
from fedlora.learning.examples import Examples, Task
from fedlora.learning.learner import Learner

TOLERANCE = 0.05
"""The largest relative error of pooled features (Frobenius) with which the fast mode is accepted."""
GAIN = 0.9
"""bfloat16 must take less than this share of float32's time: a tie is decided for the exact mode."""
LANES, BATCH, STEPS, REPEATS = 4, 2, 2, 4
ENOUGH = 512
"""Tokens that a step has, or few more: of a few short texts most of the time is calls, as long in both types."""


def measure(backbone: Backbone, task: Task, examples: Examples, spec: ModelSpec, tokens: int = 1024) -> torch.dtype:
    """Times a fused training step of the run's own examples in both types and compares their features.

    The backbone is left in the type it came in. Whoever calls writes the answer into the resolved configuration: a
    resumed run must not measure again.
    """
    before = backbone.dtype
    if not spec.sites and not spec.labels:
        return before  # there is nothing to train
    if before not in (torch.float32, torch.bfloat16) or not len(examples):
        return before
    try:
        seconds, features = dict.fromkeys((torch.float32, torch.bfloat16), math.inf), {}
        for turn, dtype in itertools.product(range(REPEATS + 1), seconds):  # in turn: what else runs slows both
            with cast(backbone, dtype):
                learner = _learner(backbone, task, examples, spec, tokens)
                if turn == 0:  # warms up
                    features[dtype] = _features(learner)
                found = _seconds(learner)
                seconds[dtype] = min(seconds[dtype], found if turn else math.inf)
    except RuntimeError:  # an operation that does not exist in bfloat16
        return torch.float32
    exact, fast = features[torch.float32].double(), features[torch.bfloat16].double()
    error = float((exact - fast).norm() / exact.norm().clamp_min(1e-12))
    quicker = seconds[torch.bfloat16] < GAIN * seconds[torch.float32]
    return torch.bfloat16 if quicker and error < TOLERANCE else torch.float32


@contextmanager
def cast(backbone: Backbone, dtype: torch.dtype) -> Iterator[None]:
    """The base in another type inside the block; afterwards the very values that it had (not those rounded)."""
    parameters = [(value, value.data) for value in backbone.module.parameters()]
    buffers = [(module, name, value) for module in backbone.module.modules() for name, value in module._buffers.items()]
    backbone.to(dtype)
    try:
        yield
    finally:
        for value, data in parameters:
            value.data = data
        for module, name, value in buffers:
            module._buffers[name] = value


def _learner(backbone: Backbone, task: Task, examples: Examples, spec: ModelSpec, tokens: int) -> Learner:
    """A few clients with evenly spread rows, whatever the run's own clients are."""
    rows = examples.spread(LANES * _batch(examples))
    splits = {str(k): {"fit": part} for k, part in enumerate(np.array_split(rows, LANES))}
    return Learner({"base": backbone}, task, examples, splits, spec, 0, LANES, tokens)


def _batch(examples: Examples) -> int:
    """How many units a lane takes in a step: as many as give all lanes enough tokens, and at least a few."""
    mean = float(examples.lengths[examples.units(examples.spread(LANES * BATCH))].mean())
    return max(BATCH, math.ceil(ENOUGH / (LANES * max(1.0, mean))))


def _seconds(learner: Learner) -> float:
    """A few fused steps: every lane takes a batch in each."""
    spec, size = learner.spec, _batch(learner.store("base"))
    train = (*(("A", "B") if spec.sites else ()), *(("head",) if spec.labels else ()))
    adapter = spec.adapter(spec.ranks, 0) | {k: v for k, v in spec.start(0).items() if k.startswith("head/")}
    for k in range(LANES):
        order = Fit(Model(adapter), train, steps=STEPS, batch_size=size, optimizer=Optimizer(lr=1e-4))
        learner.submit(Job(order, k, str(k)))
    start = time.perf_counter()
    while not learner.idle:
        learner.advance()
    return time.perf_counter() - start


def _features(learner: Learner) -> torch.Tensor:
    learner.submit(Job(Features(Model({}), "fit"), 0, "0"))
    result: Any = learner.advance()[0][1]
    return result[0]
