"""The adapted layer against dense arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.lora import Dense, Dropout, Factors, LaneLinear, Plan, applied, merged_weight, sizes
from fedlora.errors import UserError

OUT, IN, TOKENS = 7, 5, 4
SEGMENTS = ((1, 0, 2), (0, 2, 3), (2, 3, 6))
LANE_OF_ROW = (1, 1, 0, 2, 2, 2)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def linear() -> nn.Linear:
    layer = nn.Linear(IN, OUT, dtype=torch.float64)
    layer.weight.data, layer.bias.data = draw(OUT, IN), draw(OUT)
    return layer.requires_grad_(False)


def conv1d() -> Conv1D:
    layer = Conv1D(OUT, IN).double()
    layer.weight.data, layer.bias.data = draw(OUT, IN).T.contiguous(), draw(OUT)
    return layer.requires_grad_(False)


class Opaque(nn.Module):
    """A linear-like layer that only says its sizes, as quantised ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ draw(OUT, IN).T + draw(OUT)


def factors(rank: int, core: bool, lanes: int = 3, seed: int = 1, gate: torch.Tensor | None = None) -> Factors:
    middle = draw(lanes, rank, rank, seed=seed) if core else None
    scale = (0.5, 2.0, -1.5)[:lanes]
    return Factors(draw(lanes, rank, IN, seed=seed), draw(lanes, OUT, rank, seed=seed), middle, scale, gate)


def dense_change(slot: Factors, lane: int) -> torch.Tensor:
    inner = slot.A[lane] if slot.C is None else slot.C[lane] @ slot.A[lane]
    return slot.scale[lane] * slot.B[lane] @ inner


def expected(x: torch.Tensor, slots: list[Factors]) -> torch.Tensor:
    """Row by row, through the dense changed weight."""
    rows = []
    for i, lane in enumerate(LANE_OF_ROW):
        weight = draw(OUT, IN)
        for slot in slots:
            weight = weight + (1.0 if slot.gate is None else slot.gate[i]) * dense_change(slot, lane)
        rows.append(x[i] @ weight.T + draw(OUT))
    return torch.stack(rows)


@pytest.mark.parametrize("make", [linear, conv1d, Opaque])
@pytest.mark.parametrize("core", [False, True])
def test_every_lane_meets_its_own_rows(make, core):
    layer, x = LaneLinear(make(), "s"), draw(6, TOKENS, IN)
    gate = draw(6, seed=9).abs()
    slots = [factors(3, core), factors(2, not core, seed=2), factors(1, core, seed=3, gate=gate)]
    with applied([layer], Plan(SEGMENTS, {"s": tuple(slots), "elsewhere": (factors(2, False),)})):
        torch.testing.assert_close(layer(x), expected(x, slots))
        flattened = layer(x.reshape(-1, IN))  # a layer that sees all tokens in one dimension
        torch.testing.assert_close(flattened, expected(x, slots).reshape(-1, OUT))
    torch.testing.assert_close(layer(x), x @ draw(OUT, IN).T + draw(OUT))


@pytest.mark.parametrize("make", [linear, conv1d])  # whose products are part of the node; beside it
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("core", [False, True])
def test_gradients_are_those_of_autograd_through_dense_weights(core, together, make):
    x = draw(6, TOKENS, IN).requires_grad_()
    slot = factors(3, core)
    leaves = [x, *(v.requires_grad_() for v in (slot.A, slot.B, slot.C) if v is not None)]
    target = draw(6, TOKENS, OUT, seed=4)
    layer, plan = LaneLinear(make(), "s"), Plan(SEGMENTS, {"s": (slot,)})
    with applied([layer], plan.together(x.dtype, x.device) if together else plan):
        found = torch.autograd.grad((layer(x) * target).sum(), leaves)
    wanted = torch.autograd.grad((expected(x, [slot]) * target).sum(), leaves)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)


def test_a_base_that_trains_beside_its_adapter():
    x, slot = draw(6, TOKENS, IN), factors(3, False)
    base = linear().requires_grad_()
    with applied([layer := LaneLinear(base, "s")], Plan(SEGMENTS, {"s": (slot,)})):
        found = torch.autograd.grad(layer(x).square().sum(), (base.weight, base.bias))
    grad = 2 * expected(x, [slot]).flatten(0, 1)
    torch.testing.assert_close(found[0], grad.T @ x.flatten(0, 1))
    torch.testing.assert_close(found[1], grad.sum(0))


@pytest.mark.parametrize("together", [False, True])
def test_a_weight_that_is_replaced_for_one_pass_is_that_of_its_gradient(together):
    """A frozen weight of a model's own, beside an adapter that trains: by then the layer has its first one again."""
    x, slot, layer = draw(6, TOKENS, IN).requires_grad_(), factors(3, False), LaneLinear(linear(), "s")
    own, plan = draw(OUT, IN, seed=8), Plan(SEGMENTS, {"s": (slot,)})
    with applied([layer], plan.together(x.dtype, x.device) if together else plan):
        y = torch.func.functional_call(layer, {"base.weight": own}, (x,))
    (found,) = torch.autograd.grad(y.sum(), x)
    weights = torch.stack([own + dense_change(slot, lane) for lane in LANE_OF_ROW])
    torch.testing.assert_close(found, weights.sum(1)[:, None].expand_as(x))


def test_gate_receives_its_gradient():
    gate = draw(6, seed=5).requires_grad_()
    slot, x = factors(2, False, gate=gate), draw(6, TOKENS, IN)
    layer = LaneLinear(linear(), "s")
    with applied([layer], Plan(SEGMENTS, {"s": (slot,)})):
        (found,) = torch.autograd.grad(layer(x).square().sum(), gate)
    (wanted,) = torch.autograd.grad(expected(x, [slot]).square().sum(), gate)
    torch.testing.assert_close(found, wanted)


def test_padding_has_a_gradient_of_exactly_zero():
    slot = factors(4, True)
    rank = 2
    for value in (slot.A, slot.B, slot.C):
        assert value is not None
    slot.A[:, rank:], slot.B[:, :, rank:], slot.C[:, rank:], slot.C[:, :, rank:] = 0, 0, 0, 0
    leaves = [v.requires_grad_() for v in (slot.A, slot.B, slot.C)]
    layer = LaneLinear(linear(), "s")
    with applied([layer], Plan(SEGMENTS, {"s": (slot,)})):
        a, b, c = torch.autograd.grad(layer(draw(6, TOKENS, IN)).square().sum(), leaves)
    assert a[:, rank:].abs().max() == b[:, :, rank:].abs().max() == 0
    assert c[:, rank:].abs().max() == c[:, :, rank:].abs().max() == 0
    assert min(v.abs().max() for v in (a[:, :rank], b[:, :, :rank], c[:, :rank, :rank])) > 0.1


def test_a_lane_that_is_not_finite_leaves_its_neighbours_alone():
    layer, x, slot = LaneLinear(linear(), "s"), draw(6, TOKENS, IN).requires_grad_(), factors(3, True)
    with applied([layer], Plan(SEGMENTS, {"s": (slot,)})):
        clean = layer(x)
        slot.A[1, 0, 0] = float("nan")
        dirty = layer(x)
        (gx,) = torch.autograd.grad(dirty.sum(), x)
    assert dirty[:2].isnan().any()
    assert torch.equal(clean[2:], dirty[2:])
    assert gx[2:].isfinite().all()


@pytest.mark.parametrize("make", [linear, conv1d])
def test_merged_base_weight(make):
    base, change, x = make(), draw(OUT, IN, seed=6), draw(6, TOKENS, IN)
    layer = LaneLinear(base, "s")
    before = base.weight.clone()
    with applied([layer], Plan(SEGMENTS, merged={"s": merged_weight(base, change)})):
        torch.testing.assert_close(layer(x), x @ (draw(OUT, IN) + change).T + draw(OUT))
    assert torch.equal(base.weight, before)


def test_dense_change_of_one_lane():
    x, change, gate = draw(6, TOKENS, IN), draw(OUT, IN, seed=6).requires_grad_(), draw(6, seed=7)
    layer = LaneLinear(Opaque(), "s")
    with applied([layer], Plan(((0, 0, 6),), dense={"s": (Dense(change, 0.5), Dense(change, 1.0, gate))})):
        y = layer(x)
    wanted = x @ draw(OUT, IN).T + draw(OUT) + (0.5 + gate[:, None, None]) * (x @ change.T)
    torch.testing.assert_close(y, wanted)
    assert torch.autograd.grad(y.sum(), change)[0].shape == change.shape


def test_low_precision_base_keeps_float32_gradients_for_the_adapter():
    layer = LaneLinear(linear().to(torch.bfloat16), "s")
    slot = factors(3, True)
    leaves = [v.float().requires_grad_() for v in (slot.A, slot.B, slot.C)]
    x = draw(6, TOKENS, IN).to(torch.bfloat16)
    with applied([layer], Plan(SEGMENTS, {"s": (Factors(*leaves, slot.scale),)})):
        y = layer(x)
    grads = torch.autograd.grad(y.float().sum(), leaves)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)
    error = (y.double() - expected(x.double(), [slot])).norm() / expected(x.double(), [slot]).norm()
    assert error < 0.02


def test_dropout_follows_the_row_and_not_the_lane():
    layer, x, slot = LaneLinear(linear(), "s"), torch.ones(6, TOKENS, IN, dtype=torch.float64), factors(3, False)
    keys = torch.tensor([11, 12, 13, 14, 15, 16])
    with applied([layer], Plan(SEGMENTS, {"s": (slot,)}, dropout=Dropout(0.4, keys))):
        together = layer(x)
    alone = []
    for i, lane in enumerate(LANE_OF_ROW):
        with applied([layer], Plan(((lane, 0, 1),), {"s": (slot,)}, dropout=Dropout(0.4, keys[i : i + 1]))):
            alone.append(layer(x[i : i + 1]))
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.allclose(together[0], together[1])  # same lane, same input, another example


def test_dropout_drops_the_stated_share_and_keeps_the_mean():
    wide = nn.Linear(4000, 1, bias=False)
    layer = LaneLinear(wide.requires_grad_(False), "s")
    eye = Factors(torch.ones(1, 1, 4000), torch.ones(1, 1, 1), None, (1.0,))
    x = torch.ones(30, 1, 4000)
    with applied([layer], Plan(((0, 0, 30),), {"s": (eye,)}, dropout=Dropout(0.25, torch.arange(30) * 7919))):
        sums = (layer(x) - wide(x)).flatten()
    # each sum is 4/3 Binomial(4000, 3/4): mean 4000, standard deviation 36.5
    assert abs(sums.mean() - 4000) < 4 * 36.5 / 30**0.5
    assert 15 < sums.std() < 60


def test_what_is_not_linear_is_refused_by_name():
    with pytest.raises(TypeError, match="LayerNorm is not linear-like"):
        LaneLinear(nn.LayerNorm(3), "s")
    assert sizes(conv1d()) == (OUT, IN)


def test_a_selection_of_tokens_is_refused():
    layer, plan = LaneLinear(linear(), "s"), Plan(SEGMENTS, {"s": (factors(2, False),)})
    with applied([layer], plan), pytest.raises(UserError, match=r"layer 's' got 7 rows .* 6[\s\S]*\[adapter\] targets"):
        layer(draw(7, IN))


def test_a_table_that_is_no_examples_is_refused():
    layer = LaneLinear(linear(), "s")
    plan = Plan(SEGMENTS, {"s": (factors(2, False),)})
    with applied([layer], plan), pytest.raises(UserError, match=r"'s' got 1 row in .* a table of positions, "):
        layer(draw(1, 9, IN))
