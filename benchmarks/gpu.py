"""Lanes on a GPU: are they right there, and how fast beside a loop over clients with PEFT on the same work?

Run it with ``benchmarks/gpu.sh``, or as ``python -m benchmarks.gpu`` where torch has CUDA. On a CPU (``--device cpu
--quick``) it shows that everything works and writes nothing. It ends with 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import BertConfig, BertModel

from benchmarks.lanes import ALPHA, LABELS, RANK, SEED, SHAPES, Plain, Trained, Way, World, apart, fleet, world
from benchmarks.report import Report
from fedlora.errors import UserError
from fedlora.federation.rounds import rounds
from fedlora.learning.backbone import Backbone
from fedlora.learning.loading import load_backbone
from fedlora.learning.varlen import agrees

LANES, FEW = (1, 4, 16, 64), (1, 4)
"""Clients in one pass; the last also when it must be quick."""
TOKENS = 16384
"""What a pass may hold: 64 lanes of the largest shape."""
FULL, QUICK = (128, 5, 5), (4, 1, 1)
"""Clients, steps of each, repeats."""
CHECKED, CHECKED_QUICK = (12, 4), (5, 2)
"""Clients and steps of the comparisons."""
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.15}
"""How far results may be apart, in units of how far training moved them: rounding, which AdamW's division enlarges."""
WIDE = BertConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)


@dataclass(frozen=True)
class Check:
    """How far two ways to train the same are apart. ``skipped``: why nothing was compared."""

    what: str
    apart: float | None
    limit: float
    skipped: str = ""

    @property
    def wrong(self) -> bool:
        return not self.skipped and not (self.apart is not None and self.apart <= self.limit)

    @property
    def text(self) -> str:
        verdict = f"skipped: {self.skipped}" if self.skipped else "WRONG" if self.wrong else "right"
        return f"{self.what}: {verdict}" + ("" if self.apart is None else f" ({self.apart:.1e} apart)")


def base(name: str, dtype: torch.dtype, device: str) -> Backbone:
    """MiniLM, or an encoder of BERT-base's size with random weights."""
    if name == "MiniLM":
        return load_backbone("minilm", "text-classification", labels=LABELS, dtype=dtype, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = BertModel(WIDE, add_pooling_layer=False)
    return load_backbone(module, "text-classification", labels=LABELS, dtype=dtype, device=device)


def one_round(backbone: Backbone, given: World, lanes: int) -> Trained:
    """A round of the simulator with the budget of a GPU."""
    *_, last = rounds(given.algorithm, given.spec, fleet(backbone, given, lanes, TOKENS), total=1, seed=SEED)
    return {name: value.cpu() for name, value in last.state["merged"].items()}


def loop(backbone: Backbone) -> Way:
    """Client after client with PEFT: no dropout, SDPA, autocast where the base is narrower than what is trained."""
    plain = Plain.of(backbone)
    plain.model.eval()
    narrow = backbone.dtype == torch.bfloat16

    def run(given: World) -> Trained:
        with torch.autocast(backbone.device.type, torch.bfloat16, cache_enabled=False) if narrow else nullcontext():
            return plain.round(given)

    return run


# -- right?


def checks(device: str, quick: bool) -> list[Check]:
    """Lanes against one at a time, without padding against with, one at a time against PEFT, in every type; on GPUs,
    against the CPU as well."""
    found: list[Check] = []
    for dtype, limit in LIMITS.items():
        backbone = base("MiniLM", dtype, device)
        name = str(dtype).removeprefix("torch.")
        given = small(backbone, quick)
        start = given.algorithm.server_init(given.spec, SEED)["merged"]
        alone = one_round(backbone, given, 1)
        for lanes in (4, 16):
            found.append(
                Check(f"{name}, {lanes} lanes and one", apart(one_round(backbone, given, lanes), alone, start), limit)
            )
        with padded(backbone):
            wanted = one_round(backbone, given, 4)
        found.append(
            Check(f"{name}, without padding and with", apart(one_round(backbone, given, 4), wanted, start), limit)
        )
        found.append(Check(f"{name}, one lane and PEFT", apart(alone, loop(backbone)(given), start), limit))
        if device != "cpu":
            there = one_round(base("MiniLM", dtype, "cpu"), given, 1)
            found.append(Check(f"{name}, one lane here and on the CPU", apart(alone, there, start), limit))
    return [*found, four_bits(device, quick)]


@contextmanager
def padded(backbone: Backbone) -> Generator[None]:
    """Passes inside the block compute padding as well."""
    backbone.unpadded = False
    try:
        yield
    finally:
        backbone.unpadded = True


def small(backbone: Backbone, quick: bool) -> World:
    """Texts of many lengths, for comparisons."""
    wide = torch.promote_types(backbone.dtype, torch.float32)
    return world(SHAPES[-1], *(CHECKED_QUICK if quick else CHECKED), backbone.spec(RANK, ALPHA, dtype=wide))


def four_bits(device: str, quick: bool) -> Check:
    """Lanes on a base of 4-bit weights (bitsandbytes' NF4) against one at a time."""
    what, limit = "4-bit base, 4 lanes and one", LIMITS[torch.float32]
    try:
        backbone = load_backbone("minilm", "text-classification", labels=LABELS, bits=4, device=device)
    except UserError as problem:  # bitsandbytes is not installed
        return Check(what, None, limit, str(problem))
    given = small(backbone, quick)
    start = given.algorithm.server_init(given.spec, SEED)["merged"]
    return Check(what, apart(one_round(backbone, given, 4), one_round(backbone, given, 1), start), limit)


# -- fast?


@dataclass(frozen=True)
class Speed:
    """Client-steps a second of a way, the median; how often the loop's; megabytes allocated at the peak (GPUs)."""

    rate: float
    ratio: float
    megabytes: float | None


def speeds(ways: Mapping[str, Way], given: World, warm: World, repeats: int, device: str) -> dict[str, Speed]:
    """Every way in turn, ``repeats`` times; the first of them is what the others are compared with."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, float | None] = dict.fromkeys(ways)
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            spent, held = timed(partial(way, given if repeat else warm), device)
            if repeat:
                seconds[name].append(spent)
                memory[name] = held
    first = seconds[next(iter(ways))]
    return {
        name: Speed(
            statistics.median(given.client_steps / value for value in own),
            statistics.median(a / b for a, b in zip(first, own, strict=True)),
            memory[name],
        )
        for name, own in seconds.items()
    }


def timed(what: Callable[[], Any], device: str) -> tuple[float, float | None]:
    """Seconds until the device has finished, and the most megabytes that it held."""
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    what()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None


def measured(name: str, dtype: torch.dtype, device: str, quick: bool) -> list[tuple[object, ...]]:
    """The table's rows of one model in one type."""
    clients, steps, repeats = QUICK if quick else FULL
    backbone = base(name, dtype, device)
    spec = backbone.spec(RANK, ALPHA)
    lanes = FEW if quick else LANES
    ways: dict[str, Way] = {"PEFT, one at a time": loop(backbone)}
    ways |= {f"fedlora, lanes = {k}": partial(one_round, backbone, lanes=k) for k in lanes}
    found: dict[str, dict[str, Speed]] = {}
    for shape in SHAPES[1:2] if quick else SHAPES:
        given, warm = world(shape, clients, steps, spec), world(shape, max(lanes), 1, spec)
        found[shape.name] = speeds(ways, given, warm, repeats, device)
        print(f"{name}, {dtype}, {shape.name}: {found[shape.name]}", file=sys.stderr)
    rows: list[tuple[object, ...]] = []
    for way in ways:
        own = [by_way[way] for by_way in found.values()]
        held = [one.megabytes for one in own if one.megabytes is not None]
        label = f"{name}, {str(dtype).removeprefix('torch.')}: {way}"
        rows.append(
            (label, *(f"{one.rate:.1f} ({one.ratio:.2f}x)" for one in own), f"{max(held):.0f}" if held else None)
        )
    return rows


def report(device: str, quick: bool, found: Sequence[Check]) -> Report:
    """The table, with the comparisons under it."""
    clients, steps, repeats = QUICK if quick else FULL
    models = ("MiniLM",) if quick else ("MiniLM", "BERT-base's size")
    rows = [
        row
        for name in models
        for dtype in (torch.float32, torch.bfloat16)
        for row in measured(name, dtype, device, quick)
    ]
    where = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    shapes = [shape.name for shape in (SHAPES[1:2] if quick else SHAPES)]
    return Report(
        "gpu",
        f"Client-steps per second on {where}",
        ("model and way", *shapes, "MB at the peak"),
        rows,
        (
            f"one round of FedIT: {clients} clients, {steps} steps each of AdamW on adapters of rank {RANK} (query, "
            f"value) and a head; medians over {repeats} alternating repeats in one process, in brackets against the "
            "first line of the model and type",
            f"PEFT: no dropout, SDPA, bfloat16 by autocast on a bfloat16 base; fedlora: up to {TOKENS} tokens a pass",
            "apart: |difference of the round's averages| / |what training moved|",
            *(check.text for check in found),
            f"without padding in bfloat16 on this device (torch's kernel for sequences end to end): {ends(device)}",
            f"CUDA {torch.version.cuda}, device {where}",
        ),
        {"checks": [{"what": check.what, "apart": check.apart, "skipped": check.skipped} for check in found]},
    )


def ends(device: str) -> str:
    """Of the models' heads, those that are taken without padding in bfloat16."""
    taken = [f"heads of {size}" for size in (32, 64) if agrees(torch.device(device), torch.bfloat16, size)]
    return ", ".join(taken) or "nothing"


def main() -> None:
    """Compares, then measures; an answer that is wrong is not measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a short run, to see that everything works")
    given = parser.parse_args()
    if given.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu --quick shows that the benchmark works")
    found = checks(given.device, given.quick)
    print("\n".join(check.text for check in found), flush=True)
    if any(check.wrong for check in found):
        sys.exit(1)
    made = report(given.device, given.quick, found)
    print(made.markdown(given.quick))
    if given.device != "cpu":
        print(f"wrote {made.write(given.quick)}")


if __name__ == "__main__":
    main()
