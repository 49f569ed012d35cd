"""One round of FedIT on MiniLM: a plain PEFT loop against fedlora, with one lane and with eight.

Every way trains the same clients from the same start on the same batches (drawn from the same streams) with AdamW, and
averages the results; all but the first are therefore compared by what they trained as well as by their time.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.report import Report
from fedlora.algorithms.fedit import FedIT
from fedlora.engines.simulator import Simulator
from fedlora.federation.orders import Fit, Model, Optimizer, Training
from fedlora.federation.rounds import rounds
from fedlora.federation.spec import Client, ModelSpec, derive
from fedlora.learning.backbone import Backbone
from fedlora.learning.learner import Learner
from fedlora.learning.loading import load_backbone
from fedlora.learning.optim import plan
from fedlora.learning.tasks import Examples, TextClassification

SEED, RANK, ALPHA = 0, 8, 16.0
FULL, QUICK = (20, 5, 5), (8, 1, 1)
"""Clients, steps of each, repeats."""
LR, HEAD_LR = 1e-3, 1e-2
LABELS = ("a", "b", "c", "d")
TASK = TextClassification(LABELS)
Trained = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What a batch is made of. ``lengths`` draws the tokens of each example."""

    name: str
    batch: int
    lengths: Callable[[np.random.Generator, int], np.ndarray]


def fixed(tokens: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Always the same length."""
    return lambda draw, count: np.full(count, tokens, dtype=np.int64)


def texts(draw: np.random.Generator, count: int) -> np.ndarray:
    """Lengths like those of short texts: log-normal with mean 24, between 4 and 128."""
    spread = 0.7
    lengths = draw.lognormal(math.log(24) - spread**2 / 2, spread, count)
    return lengths.round().clip(4, 128).astype(np.int64)


SHAPES = (
    Shape("8 x 32 tokens", 8, fixed(32)),
    Shape("2 x 16 tokens", 2, fixed(16)),
    Shape("8 texts, 24 tokens on average, up to 128", 8, texts),
)


@dataclass(frozen=True, eq=False)
class World:
    """The clients of one shape: ``steps`` batches each, over one store of random tokens."""

    shape: Shape
    steps: int
    examples: Examples
    splits: Mapping[str, Mapping[str, np.ndarray]]
    spec: ModelSpec
    algorithm: FedIT

    @property
    def client_steps(self) -> int:
        """Of a round, all clients together."""
        return len(self.splits) * self.steps


def world(shape: Shape, clients: int, steps: int, spec: ModelSpec) -> World:
    """Random sequences (their content does not change the work) and labels."""
    draw = np.random.default_rng(SEED)
    own = steps * shape.batch
    lengths = shape.lengths(draw, clients * own)
    offsets = np.concatenate([[0], lengths.cumsum()])
    tokens = draw.integers(1000, 30000, offsets[-1]).astype(np.int32)
    labels = draw.integers(0, len(LABELS), len(lengths))
    examples = Examples(lengths, labels, np.arange(len(lengths) + 1), tokens, offsets)
    splits = {f"{k:03d}": {"fit": np.arange(k * own, (k + 1) * own)} for k in range(clients)}
    optimizer = Optimizer("adamw", lr=LR, lrs=(("head", HEAD_LR),))
    training = Training(epochs=None, steps=steps, batch_size=shape.batch, optimizer=optimizer)
    return World(shape, steps, examples, splits, spec, FedIT(training))


# -- the ways


def fleet(backbone: Backbone, world: World, lanes: int, tokens: int = 2048) -> Simulator:
    """The clients in the simulator."""
    clients = {name: Client(name, world.spec.ranks, examples=len(rows["fit"])) for name, rows in world.splits.items()}
    learner = Learner({"base": backbone}, TASK, world.examples, world.splits, world.spec, SEED, lanes, tokens)
    return Simulator(world.algorithm, world.spec, learner, clients, learner.facts, SEED, lanes=lanes)


def fedlora_round(backbone: Backbone, world: World, lanes: int) -> Trained:
    """The simulator's own loop, one round."""
    *_, last = rounds(world.algorithm, world.spec, fleet(backbone, world, lanes), total=1, seed=SEED)
    return last.state["merged"]


@dataclass(frozen=True, eq=False)
class Plain:
    """A loop over clients as one writes it with PEFT: load, train with torch.optim, take the state, average."""

    model: Any
    names: Mapping[str, nn.Parameter]

    @classmethod
    def of(cls, backbone: Backbone) -> Plain:
        """PEFT's LoRA on a copy of the same model, trained parameters by the names that fedlora gives them."""
        settings = LoraConfig(
            r=RANK, lora_alpha=int(ALPHA), target_modules=["query", "value"], modules_to_save=[backbone.head_path]
        )
        model = get_peft_model(backbone.plain(), settings)  # type: ignore[arg-type]
        names: dict[str, nn.Parameter] = {}
        for path, parameter in model.named_parameters():
            site = path.removeprefix("base_model.model.")
            for ours, theirs in (("A", ".lora_A.default.weight"), ("B", ".lora_B.default.weight")):
                if site.endswith(theirs):
                    names[f"{site.removesuffix(theirs)}/{ours}"] = parameter
            if parameter.requires_grad and ".modules_to_save." in path:
                names[f"head/{path.rpartition('.')[2]}"] = parameter
        for parameter in names.values():  # what is trained is float32 also on a narrower base
            parameter.data = parameter.data.to(torch.promote_types(backbone.dtype, torch.float32))
        return cls(model, names)

    def round(self, world: World) -> Trained:
        """One round; every client has the same number of examples, so that the mean is plain."""
        start = world.algorithm.server_init(world.spec, SEED)["merged"]
        order = Fit(Model({}), (), steps=world.steps, batch_size=world.shape.batch)
        total: dict[str, Tensor] = {}
        for client, rows in world.splits.items():
            with torch.no_grad():
                for name, parameter in self.names.items():
                    parameter.copy_(start[name])
            optimizer = torch.optim.AdamW(
                [
                    {"params": [p for n, p in self.names.items() if not n.startswith("head/")], "lr": LR},
                    {"params": [p for n, p in self.names.items() if n.startswith("head/")], "lr": HEAD_LR},
                ],
                weight_decay=0.0,
            )
            draws = torch.Generator().manual_seed(derive(SEED, "train", 1, client, 0))
            for places in plan(len(rows["fit"]), order, draws):
                inputs, labels = TASK.collate(world.examples, rows["fit"][places.numpy()])
                inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
                logits = self.model(**inputs).logits  # and not its own loss, which is float32 in any model
                loss = functional.cross_entropy(logits, labels.to(logits.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for name, parameter in self.names.items():
                value = parameter.detach().double() / len(world.splits)
                total[name] = total[name] + value if name in total else value
        return {name: value.cpu() for name, value in total.items()}


@contextmanager
def as_users_run_it(plain: Plain) -> Iterator[None]:
    """Training mode (the model's own dropout of 0.1) and SDPA, the libraries' defaults."""
    plain.model.train()
    _attention(plain.model, "sdpa")
    yield


@contextmanager
def tuned(plain: Plain, matmul: str) -> Iterator[None]:
    """No dropout, eager attention (its backward is faster for short sequences on a CPU), the faster exact products."""
    plain.model.eval()
    _attention(plain.model, "eager")
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = matmul
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def _attention(model: nn.Module, name: str) -> None:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = name


def exact_onednn() -> str:
    """The setting that sends float32 products to oneDNN: "bf16" where the processor computes them in float32 all the
    same (up to 2x on AMD), "none" (MKL) where it would round or there is no oneDNN."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    exact = a.double() @ b.double()
    try:
        settings.fp32_precision = "bf16"
        error = float(((a @ b).double() - exact).norm() / exact.norm())
    except RuntimeError:
        return "none"
    finally:
        settings.fp32_precision = before
    return "bf16" if error < 1e-5 else "none"


Way = Callable[[World], Trained]
FIRST = "PEFT float32, as users run it"
REFERENCE = "PEFT float32, tuned"


def ways() -> tuple[ModelSpec, dict[str, Way]]:
    """What all agree on, and the ways by name, the first being what the others are compared with."""
    exact = load_backbone("minilm", "text-classification", labels=LABELS)
    fast = load_backbone("minilm", "text-classification", labels=LABELS, dtype=torch.bfloat16)
    spec = exact.spec(RANK, ALPHA)
    plain, matmul = Plain.of(exact), exact_onednn()

    def loop(world: World, setting: Callable[[], Any], cast: bool = False) -> Trained:
        with setting(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if cast else nullcontext():
            return plain.round(world)

    return spec, {
        FIRST: partial(loop, setting=partial(as_users_run_it, plain)),
        REFERENCE: partial(loop, setting=partial(tuned, plain, matmul)),
        "PEFT tuned, autocast bfloat16": partial(loop, setting=partial(tuned, plain, matmul), cast=True),
        "fedlora float32, lanes = 1": partial(fedlora_round, exact, lanes=1),
        "fedlora float32, lanes = 8": partial(fedlora_round, exact, lanes=8),
        "fedlora bfloat16, lanes = 1": partial(fedlora_round, fast, lanes=1),
        "fedlora bfloat16, lanes = 8": partial(fedlora_round, fast, lanes=8),
    }


def apart(a: Trained, b: Trained, start: Trained) -> float:
    """|a - b| / |b - start| over everything that was trained."""
    names = [name for name in start if not name.endswith("/scale")]
    assert all(name in a and name in b for name in names)
    square = sum(float((a[n].double() - b[n].double()).square().sum()) for n in names)
    moved = sum(float((b[n].double() - start[n].double()).square().sum()) for n in names)
    return math.sqrt(square / moved)


def timed(shape: Shape, found: Mapping[str, Way], spec: ModelSpec, quick: bool) -> dict[str, dict[str, Any]]:
    """Every way on one shape, alternating: seconds a round, medians, and how far apart the results are."""
    clients, steps, repeats = QUICK if quick else FULL
    warm, large = world(shape, 8, 1, spec), world(shape, clients, steps, spec)
    start = large.algorithm.server_init(spec, SEED)["merged"]
    seconds: dict[str, list[float]] = {name: [] for name in found}
    trained: dict[str, Trained] = {}
    for repeat in range(1 if quick else 0, repeats + 1):
        for name, way in found.items():
            before = time.perf_counter()
            trained[name] = way(large if repeat else warm)
            if repeat:
                seconds[name].append(time.perf_counter() - before)
                print(f"{shape.name}: {name}: {large.client_steps / seconds[name][-1]:.1f}/s", file=sys.stderr)
    results: dict[str, dict[str, Any]] = {}
    for name, own in seconds.items():
        results[name] = {
            "client_steps_per_second": statistics.median(large.client_steps / value for value in own),
            "ratio": statistics.median(first / mine for first, mine in zip(seconds[FIRST], own)),
            "apart": None if name in (FIRST, REFERENCE) else apart(trained[name], trained[REFERENCE], start),
            "seconds": own,
        }
    return results


def run(quick: bool = False) -> Report:
    """Client-steps per second of every way on every shape."""
    clients, steps, repeats = QUICK if quick else FULL
    spec, found = ways()
    shapes = {shape.name: timed(shape, found, spec, quick) for shape in SHAPES}
    rows: list[tuple[object, ...]] = []
    for name in found:
        cells = [f"{r[name]['client_steps_per_second']:.1f} ({r[name]['ratio']:.2f}x)" for r in shapes.values()]
        distances = [r[name]["apart"] for r in shapes.values() if r[name]["apart"] is not None]
        rows.append((name, *cells, f"{max(distances):.1e}" if distances else None))
    library = "oneDNN (exact on this processor)"
    if exact_onednn() == "none":
        library = "the default library (oneDNN's faster ones would round to bfloat16 on this processor)"
    return Report(
        "lanes",
        "Client-steps per second of MiniLM with LoRA on query and value",
        ("way", *shapes, "apart"),
        rows,
        (
            f"one round of FedIT: {clients} clients, {steps} steps each of AdamW on adapters of rank {RANK} and a head",
            f"medians over {repeats} alternating repeats in one process; in brackets against the first line, the "
            "median of each repeat's own ratio",
            "as users run it: training mode (the model's dropout of 0.1), SDPA, default libraries",
            f"tuned: no dropout, eager attention, float32 products in {library}",
            "apart: |difference of the round's averages from the tuned loop's| / |what those moved|, the largest of "
            "the columns; all start alike and see the same batches",
        ),
        {"shapes": shapes},
    )
