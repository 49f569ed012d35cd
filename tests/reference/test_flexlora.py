"""FlexLoRA against dense numpy: exact sums, best approximations, dead rows, scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.algorithms.flexlora import FlexLoRA
from fedlora.federation.algorithm import Update
from fedlora.federation.orders import Optimizer, Training
from fedlora.federation.spec import Client, Extras, ModelSpec
from reference.fake import SITES, SPEC, Fake, array, client, close, dense, local, train

MIXED = [client("a", 1, 10), client("b", 2, 30), client("c", 4, 60)]
SHARES = (0.1, 0.3, 0.6)


def best(matrix: Any, rank: int) -> Any:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def norm(matrix: Any) -> float:
    return float(np.sqrt((np.asarray(matrix) ** 2).sum()))


@pytest.mark.parametrize("scaling", ["shared", "per-rank"])
def test_exact_sum_and_best_approximation_for_every_rank(scaling: Any) -> None:
    spec, flex = replace(SPEC, scaling=scaling), FlexLoRA()
    state, updates = train(flex, flex.server_init(spec, 0), MIXED, spec=spec)
    for site, (out, inner) in SITES.items():
        scales = {float(updates[c.id].arrays[f"{site}/scale"]) for c in MIXED}
        ranks = {"down": (1, 2, 4), "up": (1, 2, 3)}[site]
        largest = spec.ranks[site]
        assert scales == ({6.0 / largest} if scaling == "shared" else {6.0 / r for r in ranks})
        exact = sum(p * dense(updates[c.id].arrays, site) for p, c in zip(SHARES, MIXED))
        assert exact.shape == (out, inner)
        model = flex.server_model(state)
        assert model is not None
        close(dense_of(model.shared[0], site), exact)
        for who, rank in zip(MIXED, ranks):
            served = flex.broadcast(state, who, 2)
            assert served[f"{site}/A"].shape == (rank, inner)
            assert served[f"{site}/B"].shape == (out, rank)
            assert float(served[f"{site}/scale"]) == 6.0 / (largest if scaling == "shared" else rank)
            np.testing.assert_allclose(dense(served, site), best(exact, rank), atol=1e-12)
            np.testing.assert_allclose(
                array(served[f"{site}/A"]) @ array(served[f"{site}/A"]).T, np.eye(rank), atol=1e-12
            )
        lost = norm(exact - best(exact, largest)) / norm(exact)
        assert flex.measures(state)[f"truncation/{site}"] == pytest.approx(lost, abs=1e-12)


def dense_of(tree: Any, site: str) -> Any:
    return array(tree[f"{site}/W"]) if f"{site}/W" in tree else dense(tree, site)


@pytest.mark.parametrize(("out", "inner"), [(31, 12), (12, 31)])
@pytest.mark.parametrize("count", [2, 9])  # sums of ranks below and above min(out, in)
@pytest.mark.parametrize("kind", ["full", "deficient", "zero"])
def test_float32_error_is_below_1e_5(out: int, inner: int, count: int, kind: str) -> None:
    """Mixed scales, whatever the shapes: |s_r B A - best| / |dW| <= 1e-5."""
    spec = ModelSpec({"q": (out, inner)}, {"q": 8}, {}, (), 4, alpha=16.0, scaling="per-rank")
    flex, stream = FlexLoRA(), np.random.default_rng(count)
    total, exact, weight = flex.aggregator.zero(), np.zeros((out, inner)), 0
    for k in range(count):
        rank, examples = (2, 4, 8)[k % 3], 5 + k
        a, b = stream.normal(size=(rank, inner)).astype("f"), stream.normal(size=(out, rank)).astype("f")
        if kind != "full":
            b[:, (1 if kind == "deficient" else 0) :] = 0
        arrays = {"q/A": torch.tensor(a), "q/B": torch.tensor(b), "q/scale": torch.tensor(16.0 / rank)}
        total = flex.aggregator.accumulate(total, Client(str(k), {"q": rank}), Update(arrays, examples, {}))
        exact += examples * 16.0 / rank * b.astype("d") @ a.astype("d")
        weight += examples
    exact /= weight
    state = flex.server_update(flex.server_init(spec, 0), flex.aggregator.report(total), 1)
    for rank in (1, 2, 4, 8):
        served = flex.broadcast(state, Client("x", {"q": rank}), 2)
        assert served["q/A"].dtype == torch.float32
        assert norm(dense(served, "q") - best(exact, rank)) <= 1e-5 * max(norm(exact), 1e-30)
        assert np.linalg.matrix_rank(array(served["q/A"])) == rank  # no dead rows, even after a round of zeros
    assert flex.measures(state)["truncation/q"] == pytest.approx(
        norm(exact - best(exact, 8)) / max(norm(exact), 1e-300), abs=1e-6
    )


def test_a_large_client_regains_rank_after_a_round_of_small_ones() -> None:
    flex = FlexLoRA()
    state, _ = train(flex, flex.server_init(SPEC, 0), [client("a", 1)])
    served = flex.broadcast(state, client("c", 4), 2)
    assert np.linalg.matrix_rank(dense(served, "down")) == 1
    assert np.linalg.matrix_rank(array(served["down/A"])) == 4
    assert float(served["down/B"][:, 1:].abs().max()) == 0
    state, updates = train(flex, state, [client("c", 4)], round=2)
    assert np.linalg.matrix_rank(dense(updates["c"].arrays, "down")) > 2


def test_order_of_replies_decides_nothing() -> None:
    flex = FlexLoRA()
    _, updates = train(flex, flex.server_init(SPEC, 0), MIXED)
    states = []
    for order in (MIXED, MIXED[::-1]):
        total = flex.aggregator.zero()
        for who in order:
            total = flex.aggregator.accumulate(total, who, updates[who.id])
        states.append(flex.server_update(flex.server_init(SPEC, 0), flex.aggregator.report(total), 1))
    for key, value in states[0]["served"].items():
        close(states[1]["served"][key], array(value), 1e-10)


def test_before_the_first_round_smaller_ranks_are_prefixes_of_the_shared_start() -> None:
    flex = FlexLoRA()
    state = flex.server_init(SPEC, 0)
    served = flex.broadcast(state, client("a", 2), 1)
    start = SPEC.adapter(SPEC.ranks, 0)
    assert torch.equal(served["down/A"], start["down/A"][:2])
    assert float(served["down/B"].abs().max()) == 0
    assert served["down/A"].data_ptr() == state["served"]["down/A"].data_ptr()  # served as a view


def test_head_is_a_weighted_mean_and_stays_if_private() -> None:
    flex = FlexLoRA()
    begun = flex.server_init(SPEC, 0)
    state, updates = train(flex, begun, MIXED)
    by_hand = array(SPEC.start(0)["head/weight"]) + sum(
        p * array(updates[c.id].arrays["head/weight"]) for p, c in zip(SHARES, MIXED)
    )
    close(state["whole"]["head/weight"], by_hand)
    private, memories = FlexLoRA(extras=Extras(head="private")), {}
    state, updates = train(private, private.server_init(SPEC, 0), MIXED, memories=memories)
    assert not any(key.startswith("head/") for key in updates["a"].arrays)
    assert set(memories["a"]) == {"head/weight", "head/bias"}
    assert private.server_model(state) is None


def test_variants_and_one_epoch() -> None:
    flex, fake = FlexLoRA(finetune_epochs=2, training=Training(optimizer=Optimizer(lr=0.1), schedule="cosine")), Fake()
    assert FlexLoRA().training.epochs == 1
    payload = flex.broadcast(flex.server_init(SPEC, 0), MIXED[1], 5)
    variants = fake.run(flex.personalize(payload, {}, local(MIXED[1], 5, 5)))
    assert list(variants) == ["finetuned", "truncated"]
    assert (fake.log[0].epochs, fake.log[0].optimizer.lr) == (2, 0.1)
    assert fake.log[0].train == ("A", "B", "head")
