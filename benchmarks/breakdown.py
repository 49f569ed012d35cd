"""Where the time of a training step goes: MiniLM in bfloat16 at 8 x 32 tokens, by kind of operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.lanes import LABELS, RANK, SEED, SHAPES, fleet, world
from benchmarks.peers.compare import MINILM
from benchmarks.peers.flops import peak
from benchmarks.report import Report
from fedlora.federation.rounds import rounds
from fedlora.learning.batches import lanes_for
from fedlora.learning.loading import load_backbone
from fedlora.learning.prepacked import prepacks
from fedlora.study.resolution import FAST

CLIENTS, STEPS, WARM = 20, 5, 3
KINDS: Mapping[str, tuple[str, ...]] = {
    "products of linear layers and adapters": ("mm", "addmm", "addmm_", "_linear_pointwise"),
    "attention: products by head, softmax, rows to heads and back": (
        "bmm",
        "baddbmm",
        "_softmax",
        "_softmax_backward_data",
        "index_select",
    ),
    "GELU": ("gelu", "gelu_backward"),
    "layer norms": ("native_layer_norm", "native_layer_norm_backward"),
    "sums, masks, copies": ("add", "add_", "mul", "mul_", "div", "copy_", "fill_", "cat"),
}
REST = "everything else: Python, autograd, small operations"


def kind_of(name: str) -> str:
    """The kind of an operation, by the profiler's name of it.

    >>> kind_of("aten::addmm"), kind_of("Optimizer.step#AdamW.step") == REST
    ('products of linear layers and adapters', True)
    """
    short = name.rpartition("::")[2]
    return next((kind for kind, names in KINDS.items() if short in names), REST)


def shares(events: Any, seconds: float) -> dict[str, float]:
    """Each kind's share of the seconds of the main thread; the rest is what no operation accounts for."""
    spent = dict.fromkeys((*KINDS, REST), 0.0)
    for event in events:
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    spent[REST] = seconds - sum(spent[kind] for kind in KINDS)
    return {kind: value / seconds for kind, value in spent.items()}


def run(quick: bool = False) -> Report:
    """One round after some that warm up, by the profiler."""
    clients, warm = (4, 1) if quick else (CLIENTS, WARM)
    backbone = load_backbone("minilm", "text-classification", labels=LABELS, dtype=torch.bfloat16)
    backbone.prepacked = prepacks(backbone.module)
    given = world(SHAPES[0], clients, STEPS, backbone.spec(RANK, 16.0))
    lanes = lanes_for(FAST, given.examples.lengths, given.shape.batch, clients)
    reports = rounds(given.algorithm, given.spec, fleet(backbone, given, lanes, FAST), total=warm + 2, seed=SEED)
    for _ in range(warm + 1):  # round 0 is the start
        next(reports)
    with profile(activities=[ProfilerActivity.CPU]):
        next(reports)  # the profiler's own start
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        next(reports)
    averages: Any = seen.key_averages()
    seconds = sum(event.self_cpu_time_total for event in averages) / 1e6
    found = shares(averages, seconds)
    work = MINILM.per_step(given.examples.lengths, given.client_steps) * given.client_steps
    best = peak(MINILM, min(FAST, lanes * given.shape.batch * 32))
    products = next(iter(KINDS))
    threads = torch.get_num_threads()
    details = {"shares": found, "seconds": seconds, "flops": work, "bf16_gemm_peak": best, "threads": threads}
    return Report(
        "breakdown",
        "Where a training step's time goes (MiniLM, bfloat16, 8 x 32 tokens)",
        ("", "share of the time"),
        [(kind, f"{share:.0%}") for kind, share in found.items()],
        [
            f"a round of {clients} clients of {STEPS} steps, {lanes} lanes, {threads} threads, after others: "
            f"{seconds:.2f} s by the profiler",
            f"of the bfloat16 peak ({best / 1e12:.2f} TFLOP/s, the frozen products of one layer repeated) the round "
            f"uses {work / seconds / best:.0%}; the products alone, in the time that they take, "
            f"{work / seconds / best / found[products]:.0%}",
        ],
        details,
    )
