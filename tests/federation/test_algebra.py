"""Low-rank algebra and aggregators against dense computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters.algebra import (
    adapter,
    add,
    difference,
    frobenius,
    mixture,
    part,
    product,
    ranks,
    resize,
    sites,
    stack,
    whole,
)
from fedlora.adapters.lowrank import complete, svd, truncate
from fedlora.federation.aggregate import Collect, Mean, Products
from fedlora.federation.algorithm import Update
from fedlora.federation.spec import Client
from fedlora.federation.wire import decode, encode, same, tensors

WHO = Client("c", {})
EYE: Any = torch.eye


def factored(
    out: int, inner: int, rank: int, scale: float, g: torch.Generator, dtype: torch.dtype
) -> dict[str, Tensor]:
    return {
        "s/A": torch.randn(rank, inner, generator=g, dtype=dtype),
        "s/B": torch.randn(out, rank, generator=g, dtype=dtype),
        "s/scale": torch.tensor(scale, dtype=dtype),
        "head/bias": torch.randn(3, generator=g, dtype=dtype),
    }


def by_hand(tree: Any) -> np.ndarray:
    a, b, s = (tree[f"s/{name}"].double().numpy() for name in ("A", "B", "scale"))
    c = tree["s/C"].double().numpy() if "s/C" in tree else np.eye(len(a))
    return s * np.einsum("or,rq,qi->oi", b, c, a)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[dict[str, Tensor]], list[float], int]:
    """Updates of one round: in != out both ways, mixed scales and ranks, some rank-deficient or zero."""
    out, inner = draw(st.sampled_from([(40, 9), (9, 40), (24, 17), (60, 50)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    trees = []
    for _ in range(draw(st.integers(1, 5))):
        tree = factored(out, inner, draw(st.integers(1, 12)), draw(st.sampled_from([0.25, 1.0, 8.0])), g, torch.float32)
        kind = draw(st.sampled_from(["full", "full", "zero", "deficient", "core"]))
        if kind == "zero":
            tree["s/B"] = torch.zeros_like(tree["s/B"])
        if kind == "deficient":
            tree["s/A"][1:] = tree["s/A"][:1]
        if kind == "core":
            rank = len(tree["s/A"])
            tree["s/C"] = torch.randn(rank, rank, generator=g)
        trees.append(tree)
    return trees, [draw(st.floats(0.5, 100.0)) for _ in trees], draw(st.integers(1, 45))


@settings(max_examples=80, deadline=None)
@given(rounds(), st.booleans())
def test_products_and_truncation_against_dense_numpy(case: Any, dense: bool) -> None:
    trees, weights, rank = case
    aggregator = Products(dense)
    acc = aggregator.zero()
    for tree, weight in zip(trees, weights):
        acc = aggregator.accumulate(acc, WHO, Update(tree, weight, {}))
    value = aggregator.report(acc)
    exact = sum(w * by_hand(tree) for w, tree in zip(weights, trees)) / sum(weights)
    size = max(float(np.linalg.norm(exact)), 1e-30)
    assert np.linalg.norm(product(value, "s").numpy() - exact) <= 1e-12 * size
    a, b, error = truncate(value, "s", rank, seed=0)
    kept = min(rank, *exact.shape)
    assert a.shape == (kept, exact.shape[1])
    assert b.shape == (exact.shape[0], kept)
    u, s, vt = np.linalg.svd(exact)
    best = u[:, :kept] * s[:kept] @ vt[:kept]
    assert np.linalg.norm((b @ a).numpy() - best) <= 1e-5 * size
    assert abs(error - float(np.linalg.norm(s[kept:])) / size) <= 1e-7
    assert float((a @ a.T - torch.eye(kept, dtype=torch.float64)).abs().max()) < 1e-10
    assert np.allclose(
        value["head/bias"], sum(w * t["head/bias"].double().numpy() for w, t in zip(weights, trees)) / sum(weights)
    )


def test_accumulators_are_bounded_by_two_dense_sums() -> None:
    g = torch.Generator().manual_seed(1)
    aggregator = Products()
    acc, largest = aggregator.zero(), 0
    for _ in range(40):
        acc = aggregator.accumulate(acc, WHO, Update(factored(30, 20, 3, 1.0, g, torch.float32), 1.0, {}))
        largest = max(largest, sum(t.numel() for t in tensors(acc["sites"])))
    assert largest <= 2 * 30 * 20
    assert set(aggregator.report(acc)) == {"s/W", "head/bias"}


@pytest.mark.parametrize("wide", [True, False])
def test_products_of_many_columns_and_of_few(wide: bool) -> None:
    g, aggregator = torch.Generator().manual_seed(3), Products(wide=wide)
    ranks = (130, 5, 140, 128, 7, 127, 200, 1)  # some are multiplied alone, the others side by side
    trees = [factored(400, 300, rank, 0.5 + rank / 100, g, torch.float32) for rank in ranks]
    parts = [aggregator.zero(), aggregator.zero()]
    for k, tree in enumerate(trees):
        parts[k % 2] = aggregator.accumulate(parts[k % 2], WHO, Update(tree, 1.0 + k, {}))
    before = encode(parts[0])
    value = aggregator.report(aggregator.merge(*parts))
    exact = sum((1.0 + k) * by_hand(tree) for k, tree in enumerate(trees)) / sum(1.0 + k for k in range(len(trees)))
    assert np.linalg.norm(value["s/W"].double().numpy() - exact) <= (1e-13 if wide else 1e-6) * np.linalg.norm(exact)
    assert encode(parts[0]) == before


@pytest.mark.parametrize("aggregator", [Mean(), Products(), Products(dense=True)])
def test_aggregators_are_monoids_that_change_nothing(aggregator: Any) -> None:
    g = torch.Generator().manual_seed(2)
    updates = [Update(factored(9, 14, 1 + k % 3, 2.0**-k, g, torch.float64), 1.0 + k, {}) for k in range(9)]
    if isinstance(aggregator, Mean):  # names may be missing: the mean is over those who sent them
        updates = [
            Update({"x": u.arrays["head/bias"], **({"y": u.arrays["s/scale"]} if k % 2 else {})}, u.weight, {})
            for k, u in enumerate(updates)
        ]
    before = [encode(u.arrays) for u in updates]

    def fold(chosen: list[Update]) -> Any:
        acc = aggregator.zero()
        for update in chosen:
            frame = encode(acc)
            grown = aggregator.accumulate(acc, WHO, update)
            assert encode(acc) == frame
            acc = decode(encode(grown))
        return acc

    one, two, three = fold(updates[:2]), fold(updates[2:3]), fold(updates[3:])
    frames = [encode(acc) for acc in (one, two, three)]
    expected = aggregator.report(fold(updates))
    left = aggregator.merge(aggregator.merge(one, two), three)
    right = aggregator.merge(one, aggregator.merge(two, three))
    other = aggregator.merge(three, aggregator.merge(two, one))
    for acc in (left, right, aggregator.merge(aggregator.zero(), left)):
        assert same(aggregator.report(acc), expected, 1e-13)
    for site in sites(expected):
        assert torch.allclose(product(aggregator.report(other), site), product(expected, site), atol=1e-13)
    assert [encode(acc) for acc in (one, two, three)] == frames
    assert [encode(u.arrays) for u in updates] == before


def test_mean_by_hand() -> None:
    acc = Mean().zero()
    for value, weight, more in ((1.0, 3.0, {}), (5.0, 1.0, {"y": torch.tensor(7.0)})):
        acc = Mean().accumulate(acc, WHO, Update({"x": torch.tensor([value]), **more}, weight, {}))
    assert Mean().report(acc) == {"x": torch.tensor([2.0]).double(), "y": torch.tensor(7.0).double()}


def test_collect_folds_nobody_twice() -> None:
    acc = Collect().accumulate(Collect().zero(), Client("b", {}), Update({"x": torch.ones(1)}, 2.0, {}))
    acc = Collect().accumulate(acc, Client("a", {}), Update({"x": torch.zeros(1)}, 1.0, {}))
    assert list(Collect().report(acc)) == ["a", "b"]
    with pytest.raises(ValueError, match=r"folded twice: \['b'\]"):
        Collect().merge(acc, {"b": acc["b"]})


def test_svd_of_factors_and_of_the_product_agree() -> None:
    g = torch.Generator().manual_seed(3)
    for rank in (3, 8, 15):  # below, near and above half of the smaller side
        tree = factored(16, 30, rank, 0.5, g, torch.float64)
        u, s, vt = svd(tree, "s")
        assert torch.allclose(u * s @ vt, product(tree, "s"), atol=1e-12)
        dense = svd({"s/W": product(tree, "s")}, "s")[1]
        assert torch.allclose(s[:rank], dense[:rank], atol=1e-12)


def test_truncation_does_not_depend_on_the_order_of_stacking() -> None:
    """Signs and dead rows are decided by the value and the seed, not by rounding."""
    g = torch.Generator().manual_seed(4)
    trees = [factored(20, 30, 2, 1.0, g, torch.float64) for _ in range(2)]
    one = stack(trees, [0.3, 0.7])
    two = stack(trees[::-1], [0.7, 0.3])
    a, b, _ = truncate(one, "s", 8, seed=5)
    c, d, _ = truncate(two, "s", 8, seed=5)
    assert same([a, b], [c, d], 1e-10)
    assert float(b[:, 4:].abs().max()) == 0
    assert not torch.allclose(truncate(one, "s", 8, seed=6)[0][4:], a[4:])
    e, f, _ = truncate({"s/W": product(one, "s")}, "s", 8, seed=5)  # dense: null vectors are rounding
    g1, h, _ = truncate({"s/W": product(two, "s")}, "s", 8, seed=5)
    assert same([e, f], [g1, h], 1e-10)
    assert same([e, f], [a, b], 1e-10)


def test_complete_is_seeded_and_orthonormal() -> None:
    rows = torch.eye(3, 7, dtype=torch.float64)
    full = complete(rows, 7, seed=1)
    assert torch.allclose(full @ full.T, torch.eye(7, dtype=torch.float64), atol=1e-12)
    assert same(full, complete(rows, 7, seed=1))
    assert complete(rows, 3, seed=1) is rows


def test_resize_up_and_down() -> None:
    tree = factored(5, 7, 3, 2.0, torch.Generator().manual_seed(6), torch.float32)
    tree["s/C"] = torch.randn(3, 3, generator=torch.Generator().manual_seed(7))
    padded, filled = resize(tree, {"s": 6}), resize(tree, {"s": 6}, seed=1)
    for larger in (padded, filled):
        assert torch.allclose(product(larger, "s"), product(tree, "s"), atol=1e-6)
        assert same(resize(larger, {"s": 3}), tree)
        assert {key: tuple(value.shape) for key, value in larger.items() if key.startswith("s/")} == {
            "s/A": (6, 7),
            "s/B": (5, 6),
            "s/C": (6, 6),
            "s/scale": (),
        }
    assert float(padded["s/A"][3:].abs().max()) == 0
    assert float(filled["s/A"][3:].abs().min()) > 0
    assert float(filled["s/A"][3:].abs().max()) <= 7**-0.5
    assert torch.equal(filled["s/C"][3:, 3:], torch.eye(3))
    assert same(filled, resize(tree, {"s": 6}, seed=1))
    assert not same(filled, resize(tree, {"s": 6}, seed=2))


def test_resize_revives_dead_rows_only() -> None:
    tree = {"s/A": torch.ones(4, 3), "s/B": torch.ones(2, 4), "s/scale": torch.tensor(1.0)}
    tree["s/A"][1:3] = 0
    tree["s/B"][:, 2:] = 0  # row 2 is dead; 1 lives in B, 3 in A
    alive = resize(tree, {"s": 4}, seed=0)
    assert torch.equal(alive["s/A"][[0, 1, 3]], tree["s/A"][[0, 1, 3]])
    assert float(alive["s/A"][2].abs().min()) > 0
    assert same(alive["s/B"], tree["s/B"])


@settings(max_examples=30, deadline=None)
@given(rounds())
def test_stack_and_norm(case: Any) -> None:
    trees, weights, _ = case
    exact = sum(w * by_hand(tree) for w, tree in zip(weights, trees))
    size = max(float(np.linalg.norm(exact)), 1e-3)
    wide = [{k: v.double() for k, v in tree.items()} for tree in trees]
    stacked = stack(wide, weights)
    assert ranks(stacked)["s"] == sum(len(tree["s/A"]) for tree in trees)
    assert np.linalg.norm(product(stacked, "s").numpy() - exact) <= 1e-12 * size
    assert abs(frobenius(stacked) - np.linalg.norm(exact)) <= 1e-6 * size
    assert abs(frobenius({"s/W": product(stacked, "s")}) - np.linalg.norm(exact)) <= 1e-12 * size


def test_trees() -> None:
    tree = {"q/A": torch.ones(1, 2), "q/scale": torch.ones(()), "head/W": torch.ones(3), "extra/A": torch.ones(1)}
    assert set(whole(tree)) == {"extra/A"}
    assert set(adapter(tree)) == {"q/A", "q/scale", "head/W"}
    assert set(part(tree, ("A",))) == {"q/A"}
    assert sites(tree) == ["head", "q"]
    assert set(difference(tree, tree)) == {"q/A", "head/W", "extra/A"}
    with pytest.raises(KeyError, match="q/B"):
        add(tree, {"q/B": torch.ones(1)})
    moved = add({"x": torch.ones(1)}, {"x": torch.tensor([2.0**-30]).double()}, 2.0**29)
    assert same(moved, {"x": torch.tensor([1.5])})
    mixed = mixture({"b": {"x": torch.ones(2)}, "a": {"x": torch.zeros(2)}}, {"a": 0.25, "b": 0.75})
    assert same(mixed, {"x": torch.full((2,), 0.75)})


def test_how_far_the_average_of_factors_is_from_the_average_of_products() -> None:
    """Two clients, equal weights: mean(B) mean(A) - mean(BA) = -(B1 - B2)(A1 - A2) / 4."""
    g = torch.Generator().manual_seed(8)
    one, two = (factored(12, 20, 4, 1.0, g, torch.float64) for _ in range(2))
    acc = Mean().zero()
    for tree in (one, two):
        acc = Mean().accumulate(acc, WHO, Update(part(tree, ("A", "B")), 1.0, {}))
    mean = Mean().report(acc)
    gap = mean["s/B"] @ mean["s/A"] - (product(one, "s") + product(two, "s")) / 2
    assert torch.allclose(gap, -(one["s/B"] - two["s/B"]) @ (one["s/A"] - two["s/A"]) / 4, atol=1e-12)
    assert float(gap.norm()) > 0.3 * float(((product(one, "s") + product(two, "s")) / 2).norm())
