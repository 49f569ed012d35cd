"""Gradient checkpointing: the same numbers, bit for bit, while little is kept between the passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fedlora
from fedlora.adapters.lora import Plan
from fedlora.errors import UserError
from fedlora.learning.backbone import Backbone
from fedlora.learning.loading import load_backbone
from learning.test_packing import LENGTHS, batch, gated, known, outcome
from learning.worlds import LABELS, VOCAB, llama, seeded
from study import tiny

ADAPTER = "adapters/global/adapter_model.safetensors"


def images() -> Backbone:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, image_size=16, patch_size=4
    )
    module = seeded(lambda: transformers.ViTModel(config, add_pooling_layer=False))
    return load_backbone(module, "image-classification", labels=LABELS, dtype=torch.float64)


def decoder() -> Backbone:
    """A classifier that, left to itself, fills a cache of keys and values in every pass."""
    return load_backbone(llama(causal=False), "text-classification", labels=LABELS, dtype=torch.float64)


def twice(make: Any) -> tuple[Backbone, Backbone]:
    """A model without and with checkpointing."""
    plain, sparing = make(), make()
    sparing.checkpoint()
    return plain, sparing


def calls(base: Backbone) -> list[int]:
    """Grows by one whenever the first adapted layer computes."""
    seen: list[int] = []
    layer = next(iter(base.sites.values()))
    layer.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("unpadded", [True, False])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "qwen2", "gpt2", "decoder"])
def test_bits_are_those_without(kind: str, unpadded: bool) -> None:
    plain, sparing = twice(decoder if kind == "decoder" else lambda: known(kind))
    seen = calls(sparing)
    wanted, found = outcome(plain, unpadded), outcome(sparing, unpadded)
    assert len(seen) == 2  # on the way there and on the way back
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(mine, other) for mine, other in zip(found[1], wanted[1]))


def test_all_lanes_together_in_bfloat16() -> None:
    plain, sparing = twice(lambda: known("bert", torch.bfloat16))
    wanted, found = (outcome(base, True, together=True) for base in (plain, sparing))
    assert all(torch.equal(mine, other) for mine, other in zip(found[1], wanted[1]))


def test_images() -> None:
    plain, sparing = twice(images)
    seen, pixels = calls(sparing), torch.randn(len(LENGTHS), 3, 16, 16, dtype=torch.float64)
    found: list[tuple[torch.Tensor, ...]] = []
    for base in (plain, sparing):
        plan, leaves = gated(base)
        features, _ = base.forward({"pixel_values": pixels}, plan)
        found.append(torch.autograd.grad(features.square().sum(), leaves))
    assert len(seen) == 2
    assert all(torch.equal(mine, other) for mine, other in zip(*found))


def test_replaced_parameters_are_those_of_the_pass() -> None:
    plain, sparing = twice(lambda: known("bert"))
    path = next(path for path in plain._actual if "layer.0" in path and path.endswith("LayerNorm.weight"))
    found: list[torch.Tensor] = []
    for base in (plain, sparing):
        own = (2 * base.parameter(path)).requires_grad_()
        features, _ = base.forward(batch(), overrides={path: own})
        found += torch.autograd.grad(features.square().sum(), own)
    assert torch.equal(*found)
    assert float(found[0].norm()) > 0


def test_with_what_lower_layers_said() -> None:
    made = [load_backbone(known("bert").plain(), "text-classification", labels=LABELS, layers=[1]) for _ in range(2)]
    made[1].checkpoint()
    for base in made:
        base.remember(1 << 30)
    wanted, found = (outcome(base, True) for base in made)
    assert all(torch.equal(mine, other) for mine, other in zip(found[1], wanted[1]))


def test_little_is_kept_between_the_passes() -> None:
    plain, sparing = twice(lambda: known("bert"))
    held: list[int] = []
    for base in (plain, sparing):
        plan, _ = gated(base)
        sizes: list[int] = []

        def count(value: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(value.numel() * value.element_size())
            return value

        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            base.forward(batch(), plan)
        held.append(sum(sizes))
    assert held[1] < held[0] / 20  # layers keep their inputs besides, which no hook sees: 24 numbers a token and layer


def test_nothing_is_left_behind_after_a_pass() -> None:
    base = known("bert")
    base.checkpoint()
    plan, _ = gated(base)
    base.forward(batch(), plan)
    assert all("forward" not in vars(module) for module in base.module.modules())
    with torch.no_grad():  # scoring computes nothing twice
        seen = calls(base)
        base.forward(batch(), Plan(plan.segments))
    assert len(seen) == 1


def test_a_model_without_such_layers_is_refused_by_name() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(VOCAB, 8), torch.nn.Linear(8, len(LABELS)))
    module.head = torch.nn.Linear(8, len(LABELS))
    base = load_backbone(module, "image-classification", labels=LABELS)
    with pytest.raises(UserError, match="Sequential"):
        base.checkpoint()


def test_a_run_with_it_gives_the_same_adapter(tmp_path: Path) -> None:
    file = tiny.run_file(tmp_path, adapter="rank = 2\n")
    plain = fedlora.run(file, out=tmp_path / "plain")
    sparing = fedlora.run(file, out=tmp_path / "sparing", engine={"checkpointing": True})
    one, other = (load_file(tmp_path / run / ADAPTER) for run in ("plain", "sparing"))
    assert all(torch.equal(other[name], value) for name, value in one.items())
    assert sparing.summary["personal"] == plain.summary["personal"]
    assert sparing.summary["flops"] > plain.summary["flops"]
