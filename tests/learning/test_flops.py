"""Operations counted: sums of a few passes against torch's counter on every pass, and layers by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedlora.federation.orders import Features, Fit, Model, Optimizer, Score, Tuned
from fedlora.learning.backbone import LONG
from fedlora.learning.cnn import PIXELS
from fedlora.learning.examples import Examples
from fedlora.learning.flops import Counter, Meter
from fedlora.learning.loading import load_backbone
from fedlora.learning.tasks import CausalLM, ImageClassification
from learning.worlds import RANKS, adapter, backbone, distance, examples, learner, run, seeded, spec_of, splits

aten = torch.ops.aten
ON_CPUS = {  # torch's counter does not know them
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **named: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *rest, **named: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}
SIZES = 5  # of passes of one kind: rows, tokens with and without padding, scores, tokens that meet all lanes' factors
CLIENTS = [f"c{k}" for k in range(6)]


def orders(spec, kind: str):
    trees = [adapter(spec, RANKS[k % 3], seed=k) for k in range(len(CLIENTS))]
    train = ("A", "B", *(("head",) if spec.labels else ()))
    make = {
        "fit": lambda t: Fit(Model(t), train, 2, batch_size=4),
        "whole": lambda t: Fit(Model({}), ("backbone", *(("head",) if spec.labels else ())), 2, batch_size=4),
        "score": lambda t: Score(Model(t), "train"),
        "features": lambda t: Features(Model(t), "train"),
    }[kind]
    return {client: make(tree) for client, tree in zip(CLIENTS, trees)}


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize(
    ("model", "kind"),
    [("bert", "fit"), ("bert", "whole"), ("bert", "score"), ("bert", "features"), ("llama", "fit"), ("gpt2", "whole")],
)
def test_a_few_counted_passes_are_enough(model: str, kind: str, lanes: int, monkeypatch) -> None:
    options = {}
    if model != "bert":
        options = {"task": CausalLM(), "examples": examples(splits(len(CLIENTS))[1], causal=True)}

    plain, counted = learner(backbone(model), lanes, **options), learner(backbone(model), lanes, **options)
    results = run(counted, orders(counted.spec, kind))
    monkeypatch.setattr(Meter, "cost", lambda *given: 0.0)
    with FlopCounterMode(display=False, custom_mapping=ON_CPUS) as every:  # torch's own, around every pass
        run(plain, orders(plain.spec, kind))
    assert counted.meter.clients.keys() == set(CLIENTS)
    assert counted.meter.total == pytest.approx(every.get_total_flops(), rel=1e-9)
    kinds = len(RANKS) if lanes == 1 and kind != "whole" else 1
    assert sum(map(len, counted.meter.known.values())) <= SIZES * kinds
    unseen = run(learner(backbone(model), lanes, **options), orders(plain.spec, kind))  # counting changes no bit
    for client in CLIENTS:
        if isinstance(results[client], Tuned):
            assert distance(results[client].params, unseen[client].params) == 0


@pytest.mark.parametrize("kind", ["fit", "score"])
def test_factors_of_all_lanes_in_one_product_are_counted(kind: str, monkeypatch) -> None:
    """And those of the last client's, which has its passes for itself."""
    spec = spec_of(backbone(), torch.float32)
    plain, counted = (learner(backbone(dtype=torch.bfloat16), 4, spec=spec) for _ in range(2))
    run(counted, orders(counted.spec, kind))
    monkeypatch.setattr(Meter, "cost", lambda *given: 0.0)
    with Counter() as every:
        run(plain, orders(plain.spec, kind))
    assert counted.meter.total == pytest.approx(every.total, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("model", "kind"), [("bert", "fit"), ("bert", "score"), ("llama", "fit")])
def test_texts_on_both_sides_of_a_long_one_are_counted(model: str, kind: str, dtype: torch.dtype, monkeypatch) -> None:
    """Passes without padding and with it, by plain products and by SDPA, in one run."""
    monkeypatch.setitem(LONG, dtype, 9)
    options = {}
    if model != "bert":
        options = {"task": CausalLM(), "examples": examples(splits(len(CLIENTS))[1], causal=True)}
    wide = torch.promote_types(dtype, torch.float32)
    spec = spec_of(backbone(model), wide)
    plain, counted = (learner(backbone(model, dtype), 3, spec=spec, **options) for _ in range(2))
    lengths = plain.store("base").lengths
    assert lengths.min() < 9 <= lengths.max()
    run(counted, orders(counted.spec, kind))
    monkeypatch.setattr(Meter, "cost", lambda *given: 0.0)
    with Counter() as every:
        run(plain, orders(plain.spec, kind))
    assert counted.meter.total == pytest.approx(every.total, rel=1e-9)
    assert all(value > 0 for value in counted.meter.clients.values())


def test_fused_attention_is_counted_like_its_products() -> None:
    q, k, v = (torch.randn(2, 3, 70, 8, requires_grad=True) for _ in range(3))
    with Counter() as fused:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with Counter() as products:
        apart = (q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(out, apart)
    assert fused.total == products.total == 2 * (2 * 2 * 3 * 70 * 70 * 8)
    with Counter() as back:
        torch.autograd.grad(out.sum(), (q, k, v))
    assert 2 * fused.total <= back.total <= 2.5 * fused.total  # the scores are computed again


def test_experts_in_one_product_are_counted_like_one_after_another() -> None:
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    model = seeded(lambda: transformers.MixtralModel(config))
    counts: list[tuple[int, int]] = []
    for how in ("eager", "grouped_mm"):
        model.config._experts_implementation = how
        with Counter() as forward:
            out = model(input_ids=torch.arange(60).view(2, 30), use_cache=False).last_hidden_state
        with Counter() as back:
            torch.autograd.grad(out.sum(), list(model.parameters()), allow_unused=True)
        counts.append((forward.total, back.total))
    assert counts[0] == counts[1]
    assert counts[0][0] > 2 * 60 * 2 * 3 * 24 * 40 * 2  # two layers, two experts for each of 60 tokens, three products


def test_a_cnn_by_hand() -> None:
    """Multiply-adds count twice; a backward pass costs two forward ones, but for the pixels' own gradient."""
    labels = ("a", "b", "c")
    base = load_backbone("cnn-4", "image-classification", labels=labels, targets=[])
    parts, count = splits(2)
    draw = np.random.default_rng(0)
    store = Examples(
        np.full(count, 4), draw.integers(0, 3, count), np.arange(count + 1),
        pixels=draw.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8), prepare=PIXELS,
    )  # fmt: skip
    executor = learner(base, clients=2, spec=base.spec(1), task=ImageClassification(labels), examples=store)
    first = 2 * 28 * 28 * 16 * 75
    forward = first + 2 * (10 * 10 * 32 * 400 + 800 * 800 + 800 * 500 + 500 * 3)
    run(executor, {"c0": Score(Model({}), "test")})
    assert executor.meter.total == forward * len(parts["c0"]["test"])
    rows = len(parts["c1"]["fit"])
    fit = Fit(Model({}), ("backbone", "head"), 3, batch_size=8, optimizer=Optimizer("sgd", 0.01), split="fit")
    run(executor, {"c1": fit})
    assert executor.meter.clients["c1"] == 3 * rows * (3 * forward - first)
    head = Fit(Model({}), ("head",), 1, batch_size=8, split="fit")
    run(executor, {"c0": head})
    more = executor.meter.clients["c0"] - forward * len(parts["c0"]["test"])
    assert more == len(parts["c0"]["fit"]) * (forward + 2 * 500 * 3)  # nothing flows back into a frozen base
    assert torch.is_grad_enabled()
