"""HetLoRA by loops: padding, weights by the product's norm, truncation, self-pruning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedlora.algorithms.hetlora import HetLoRA, Trailing
from fedlora.federation.orders import Batch, Outputs
from reference.fake import SITES, SPEC, Fake, array, client, close, dense, local, train

MIXED = [client("a", 1, 10), client("b", 2, 30), client("c", 4, 60)]


def size_of(tree: Any) -> float:
    return float(np.sqrt(sum((dense(tree, site) ** 2).sum() for site in SITES)))


@pytest.mark.parametrize("scaling", ["shared", "per-rank"])
def test_padded_average_weighted_by_the_products_norm(scaling: Any) -> None:
    spec, het = replace(SPEC, scaling=scaling), HetLoRA()
    state, updates = train(het, het.server_init(spec, 0), MIXED, spec=spec)
    sizes = [size_of(updates[c.id].arrays) for c in MIXED]
    for site, (out, inner) in SITES.items():
        reference = float(spec.scale(site, spec.ranks[site]))
        a, b = np.zeros((spec.ranks[site], inner)), np.zeros((out, spec.ranks[site]))
        for who, size in zip(MIXED, sizes):
            sent = updates[who.id].arrays
            right, left, s = array(sent[f"{site}/A"]), array(sent[f"{site}/B"]), float(sent[f"{site}/scale"])
            for row in range(len(right)):
                a[row] += size / sum(sizes) * right[row]
                b[:, row] += size / sum(sizes) * s / reference * left[:, row]
        close(state["adapter"][f"{site}/A"], a)
        close(state["adapter"][f"{site}/B"], b)
        for who in MIXED:  # truncation: the first rows, and the product of the rows that are left
            served, rank = het.broadcast(state, who, 2), min(who.ranks[site], spec.ranks[site])
            close(served[f"{site}/A"], a[:rank])
            np.testing.assert_allclose(dense(served, site), reference * b[:, :rank] @ a[:rank], atol=1e-12)
            assert float(served[f"{site}/scale"]) == float(spec.scale(site, rank))


def test_rows_that_nobody_trained_keep_their_value() -> None:
    het = HetLoRA()
    begun = het.server_init(SPEC, 0)
    state, _ = train(het, begun, MIXED[:2])
    for site in SITES:
        assert not torch.equal(state["adapter"][f"{site}/A"][:2], begun["adapter"][f"{site}/A"][:2])
        assert torch.equal(state["adapter"][f"{site}/A"][2:], begun["adapter"][f"{site}/A"][2:])
        assert float(begun["adapter"][f"{site}/A"][2:].abs().min()) > 0  # alive: a large client's next update has them
    _, updates = train(het, state, [client("c", 4)], round=2)
    assert np.linalg.matrix_rank(dense(updates["c"].arrays, "down")) > 2


def test_the_head_counts_examples_not_norms() -> None:
    het = HetLoRA()
    state, updates = train(het, het.server_init(SPEC, 0), MIXED)
    by_hand = sum(p * array(updates[c.id].arrays["head/bias"]) for p, c in zip((0.1, 0.3, 0.6), MIXED))
    close(state["whole"]["head/bias"], by_hand)


def test_a_round_of_zero_products_changes_no_factor() -> None:
    het = HetLoRA()
    begun = het.server_init(SPEC, 0)
    total = het.aggregator.zero()
    for who in MIXED:
        update, _ = Fake(size=0.0).run(het.client_update(het.broadcast(begun, who, 1), {}, local(who)))
        total = het.aggregator.accumulate(total, who, update)
    state = het.server_update(begun, het.aggregator.report(total), 1)
    assert all(torch.equal(state["adapter"][key], value) for key, value in begun["adapter"].items())


def test_rows_of_who_counts_for_nothing_keep_their_value() -> None:
    """Zero in A and in B they would never train again."""
    het = HetLoRA()
    begun = het.server_init(SPEC, 0)
    total = het.aggregator.zero()
    for who, size in ((client("large", 4), 0.0), (client("small", 1), 0.5)):
        update, _ = Fake(size=size).run(het.client_update(het.broadcast(begun, who, 1), {}, local(who)))
        total = het.aggregator.accumulate(total, who, update)
    state = het.server_update(begun, het.aggregator.report(total), 1)
    for site in SITES:
        assert torch.equal(state["adapter"][f"{site}/A"][1:], begun["adapter"][f"{site}/A"][1:])
        assert not torch.equal(state["adapter"][f"{site}/A"][:1], begun["adapter"][f"{site}/A"][:1])


def test_self_pruning_gives_up_shrunken_rows_for_good() -> None:
    het = HetLoRA(prune=0.5)
    payload = dict(het.broadcast(het.server_init(SPEC, 0), client("c", 4), 1))
    for site in SITES:
        payload[f"{site}/B"] = torch.ones_like(payload[f"{site}/B"])
    shrunk = {k: 0.1 * v if k == "down/B" else 2 * v if k == "up/B" else v for k, v in payload.items()}
    assert het.pruned(payload, shrunk) == {"down": 2, "up": 3}
    assert het.pruned(payload, payload) == {"down": 4, "up": 3}  # equal is not smaller
    assert HetLoRA().pruned(payload, shrunk) == {"down": 4, "up": 3}
    half = {k: v * torch.tensor([1.0, 1.0, 0.5, 0.5]) if k == "down/B" else v for k, v in payload.items()}
    assert het.pruned(payload, half)["down"] == 2  # only the last rows are looked at
    front = {k: v * torch.tensor([0.5, 0.5, 1.0, 1.0]) if k == "down/B" else v for k, v in payload.items()}
    assert het.pruned(payload, front)["down"] == 4
    update, memory = Fake(size=0.0).run(
        het.client_update(payload, {"ranks": {"down": 2, "up": 1}, "private": {}}, local(client("c")))
    )
    assert update.arrays["down/A"].shape == (2, 9)
    assert update.arrays["up/B"].shape == (7, 1)
    assert memory["ranks"] == {"down": 2, "up": 1}
    [(_, model)] = Fake().run(het.personalize(payload, memory, local(client("c")))).items()
    assert model.params["down/A"].shape == (2, 9)
    expected = het.expects(het.server_init(SPEC, 0), client("c"), 1, "train")
    assert (expected["down/A"], expected["down/B"]) == ((-1, 9), (4, -1))  # only the client knows what it gave up


def test_penalty_by_numpy_and_its_gradient_at_zero() -> None:
    params = {k: v.clone() for k, v in SPEC.adapter(SPEC.ranks, 0).items()}
    for site in SITES:
        params[f"{site}/B"] = torch.arange(params[f"{site}/B"].numel(), dtype=torch.float64).view_as(
            params[f"{site}/B"]
        )
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    loss = Trailing(0.5, 0.1)({"model": Outputs(logits, logits)}, {"model": params}, Batch(None, labels))
    tails = 0.0
    for site, first in (("down", 2), ("up", 1)):
        a, b = array(params[f"{site}/A"]), array(params[f"{site}/B"])
        tails += np.sqrt((a[first:] ** 2).sum()) * np.sqrt((b[:, first:] ** 2).sum())
    close(loss, array(cross_entropy(logits, labels, reduction="none")) + 0.1 * tails)
    zero = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    tree = {"down/A": params["down/A"], "down/B": zero, "down/scale": params["down/scale"]}
    Trailing(0.5, 0.1)({"model": Outputs(logits, logits)}, {"model": tree}, Batch(None, labels)).sum().backward()
    assert torch.isfinite(zero.grad).all()  # type: ignore[arg-type]
