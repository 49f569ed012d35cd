"""Weights in another order: products of bfloat16 as accurate as before, and never those of a weight that is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import fedlora
from fedlora.adapters.subspace import halves_are_fast
from fedlora.learning import prepacked
from fedlora.learning.backbone import Backbone
from fedlora.learning.fast import cast
from fedlora.learning.flops import Counter
from fedlora.learning.prepacked import Prepacked, prepack, prepacks, using
from learning.test_checkpointing import ADAPTER
from learning.test_packing import batch, known, outcome
from study import tiny

pytestmark = pytest.mark.skipif(not halves_are_fast(), reason="this processor has no products in bfloat16")
BF16 = torch.bfloat16


def layer(bias: bool = True, trains: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(37, 21, bias=bias).to(BF16).requires_grad_(trains)


def given(shape: tuple[int, ...] = (5, 3, 37)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(BF16)


def ready(dtype: torch.dtype = BF16) -> Backbone:
    base = known("bert", dtype)
    base.prepacked = prepacks(base.module)
    return base


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 37), (1, 37), (2000, 37)])
def test_a_product_and_its_gradient(bias: bool, shape: tuple[int, ...]) -> None:
    own, x = layer(bias), given(shape).requires_grad_()
    y = prepack(own)(x)
    assert y.grad_fn is not None
    exact = functional.linear(x.double(), own.weight.double(), own.bias.double() if bias else None).detach()
    assert float((y.detach().double() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())  # one rounding
    grad = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(own(x), x, grad)[0])


def test_another_weight_is_seen() -> None:
    """Replaced, changed in place, of another type, or trained: each is what the layer computes with."""
    own, x = layer(), given()
    fast = prepack(own)
    with using([fast]):
        kept = own.weight.data
        own.weight.data = 2 * kept
        assert torch.equal(own(x), functional.linear(x, 2 * kept, own.bias))
        own.weight.data = kept
        with torch.no_grad():
            own.weight.mul_(3)
        assert torch.equal(own(x), functional.linear(x, own.weight, own.bias))
        instead = {"weight": torch.randn(21, 37).to(BF16).requires_grad_()}
        y: Any = torch.func.functional_call(own, instead, (x,))
        assert torch.equal(y, functional.linear(x, instead["weight"], own.bias))
        assert float(torch.autograd.grad(y.sum(), instead["weight"])[0].abs().sum()) > 0


def test_only_frozen_layers_of_bfloat16_are() -> None:
    module = nn.Sequential(layer(), layer(trains=True), layer().float(), nn.LayerNorm(3).to(BF16))
    assert [one.layer for one in prepacks(module)] == [module[0]]


def test_without_instructions_for_it_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "halves_are_fast", lambda: False)
    assert prepacks(nn.Sequential(layer())) == []


@pytest.mark.parametrize("together", [True, False])
def test_a_pass_is_as_near_to_float64_as_without(together: bool) -> None:
    exact, plain, fast = known("bert"), known("bert", BF16), ready()
    assert len(fast.prepacked) == 2 * 6
    wanted, without, found = (outcome(base, True, together=together) for base in (exact, plain, fast))

    def error(parts: Any) -> float:
        pairs = list(zip(parts[1], wanted[1]))
        return sum(float((a.double() - b).norm()) for a, b in pairs) / sum(float(b.norm()) for _, b in pairs)

    assert error(found) < 1.5 * error(without) < 0.1


def test_layers_computed_again_give_the_same_bits() -> None:
    plain, sparing = ready(), ready()
    sparing.checkpoint()
    wanted, found = (outcome(base, True, together=True) for base in (plain, sparing))
    assert all(torch.equal(mine, other) for mine, other in zip(found[1], wanted[1]))


def test_operations_are_counted_as_without() -> None:
    totals: list[int] = []
    for base in (known("bert", BF16), ready()):
        with Counter() as counter, torch.no_grad():
            base.forward(batch())
        totals.append(counter.total)
    assert totals[0] == totals[1] > 0


def test_nothing_is_left_behind_and_another_type_computes_as_ever() -> None:
    base, plain = ready(), known("bert", BF16)
    base.forward(batch())
    assert all("forward" not in vars(module) for module in base.module.modules())
    with cast(base, torch.float32), cast(plain, torch.float32), torch.no_grad():
        assert torch.equal(base.forward(batch())[0], plain.forward(batch())[0])


def test_a_run_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    whole = Prepacked.__call__

    def counted(self: Prepacked, input: torch.Tensor) -> torch.Tensor:
        used.append(1)
        return whole(self, input)

    monkeypatch.setattr(Prepacked, "__call__", counted)
    file = tiny.run_file(tmp_path, adapter="rank = 2\n")
    file.write_text(file.read_text().replace('"float32"', '"bfloat16"'))
    found: list[dict[str, torch.Tensor]] = []
    for name, wanted in (("with", True), ("without", False)):
        fedlora.run(file, out=tmp_path / name, engine={"prepack": wanted})
        found.append(load_file(tmp_path / name / ADAPTER))
        assert bool(used) == wanted
        used.clear()
    difference = sum(float((a - b).norm()) for a, b in zip(*(one.values() for one in found)))
    assert difference < 0.05 * sum(float(a.norm()) for a in found[0].values())
