"""What a configuration leaves open, settled: by the algorithm's defaults, by the data, by a measurement."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import numpy as np
import torch

from fedlora.data.population import Population
from fedlora.errors import UserError
from fedlora.federation.algorithm import Algorithm
from fedlora.federation.sampling import size
from fedlora.federation.spec import ModelSpec
from fedlora.learning.backbone import Backbone
from fedlora.learning.batches import lanes_for
from fedlora.learning.fast import measure
from fedlora.learning.tasks import Examples, Task
from fedlora.study import algorithm as algorithms
from fedlora.study.config import RunConfig

TOKENS, FAST = 2048, 4096
"""Of a pass, where nobody says how many; the second in bfloat16, whose products are so fast that calls weigh more (a
language model, which has logits for each token, stays with the first)."""
SOME = 256
"""Clients, and examples, that are looked at to settle how many clients train in one pass."""


def device_of(name: str) -> str:
    """The name of the device that "auto" stands for, or that a user asks for."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"[engine] device = {name!r}: {error}", 'use "auto", "cpu" or "cuda"') from None
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        there = f"of CUDA's devices there {'is' if found == 1 else 'are'} {found or 'none'} here"
        raise UserError(f"[engine] device = {name!r}: {there}", 'use "auto" or "cpu"' + ', or "cuda"' * bool(found))
    return name


def resolved(
    config: RunConfig,
    algorithm: Algorithm[Any, Any, Any],
    population: Population,
    backbone: Backbone,
    task: Task,
    examples: Examples,
    spec: ModelSpec,
) -> RunConfig:
    """The configuration with all that was open: the algorithm's defaults, labels, alpha, the measured compute type."""
    config = algorithms.stated(config, algorithm)
    dtype = config.model.dtype
    private_models = config.clients.models is not None
    if dtype == "auto" and private_models:
        dtype = "float32"  # they train whole
    if dtype == "auto":
        chosen = measure(backbone, task, examples, spec)
        dtype = str(chosen).removeprefix("torch.")
    auto = config.engine
    fast = dtype == "bfloat16" and backbone.kind != "causal-lm"
    tokens = (FAST if fast else TOKENS) if auto.tokens == "auto" else auto.tokens
    lanes = auto.lanes
    if lanes == "auto" and private_models:
        lanes = 1  # models that train whole have a pass each
    elif lanes == "auto":
        cohort = size(config.training.clients_per_round, len(population.clients))
        own = [len(rows["fit"]) for rows in islice(population.clients.values(), SOME)]
        batch = min(config.training.batch_size or 1, max(1, int(np.median(own))))
        some = examples.units(examples.spread(SOME))
        lanes = lanes_for(tokens, examples.lengths[some], batch, cohort)
    return config.replace(
        model={"dtype": dtype},
        adapter={"alpha": spec.alpha},
        data={
            "labels": list(population.labels) or None,
            "max_length": getattr(task, "max_length", None) if private_models else config.data.max_length,
        },
        clients={"ranks": config.clients.ranks or config.adapter.rank},
        engine={
            "lanes": lanes,
            "tokens": tokens,
            "device": os.fspath(device_of(auto.device)),
        },
    )
