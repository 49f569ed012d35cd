"""FedEx-LoRA: the change of every round is exact, by dense sums; what travels and how large it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.algorithms.fedex_lora import FedExLoRA
from fedlora.algorithms.merging import received
from fedlora.errors import UserError
from fedlora.federation.algorithm import Update
from fedlora.federation.spec import Client, Extras, ModelSpec
from reference.fake import SITES, SPEC, Fake, array, client, close, dense, local, train

CLIENTS = [client("a", examples=10), client("b", examples=30), client("c", examples=60)]
SHARES = (0.1, 0.3, 0.6)
WIDE = ModelSpec({"q": (40, 31)}, {"q": 2}, {}, (), 5, alpha=6.0, dtype=torch.float64)


def factors(state: Any, update: Any, site: str) -> dict[str, Any]:
    """A client's trained A and B by numpy."""
    return {f: array(state["tree"][f"{site}/{f}"]) + array(update.arrays[f"{site}/{f}"]) for f in "AB"}


def held(tree: Any, site: str) -> Any:
    return array(tree[f"{site}/W"]) if f"{site}/W" in tree else dense(tree, site)


def test_base_and_adapter_together_are_the_exact_sum_of_every_round() -> None:
    fedex = FedExLoRA()
    state, before = fedex.server_init(SPEC, 0), dict.fromkeys(SITES, 0.0)
    for round in (1, 2, 11):
        begun = state
        state, updates = train(fedex, begun, CLIENTS, round=round)
        model = fedex.server_model(state)
        assert model is not None
        for site in SITES:
            s, trained = float(state["tree"][f"{site}/scale"]), [factors(begun, updates[c.id], site) for c in CLIENTS]
            exact = sum(p * s * t["B"] @ t["A"] for p, t in zip(SHARES, trained))
            shared = sum(held(merge, site) for merge in model.shared if f"{site}/A" in merge or f"{site}/W" in merge)
            np.testing.assert_allclose(dense(model.params, site) + shared, before[site] + exact, atol=1e-11)
            for f in "AB":  # the adapter itself is FedIT's
                close(model.params[f"{site}/{f}"], sum(p * t[f] for p, t in zip(SHARES, trained)))
            before[site] = shared
    assert len(state["merges"]) == 3
    shared, merges = received(fedex.broadcast(state, client("d"), 12))  # one that missed everything
    assert set(shared) == set(state["tree"])
    for kept, arrived in zip(model.shared, merges, strict=True):
        assert set(kept) == set(arrived)
        assert all(kept[key] is arrived[key] for key in kept)  # by reference: merged once for all clients


def folded(fedex: FedExLoRA, state: Any, steps: list[dict[str, torch.Tensor]]) -> Any:
    """A round of clients with 30, 60, ... examples that moved by the given steps."""
    total = fedex.aggregator.zero()
    for k, arrays in enumerate(steps, 1):
        total = fedex.aggregator.accumulate(total, Client(str(k), {"q": 2}), Update(arrays, 30.0 * k, {}))
    return fedex.server_update(state, fedex.aggregator.report(total), 1)


def step(seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "q/A": torch.randn(rank, 31, generator=draw, dtype=torch.float64),
        "q/B": torch.randn(40, rank, generator=draw, dtype=torch.float64),
    }


def test_two_clients_by_hand_and_a_merge_as_short_as_it_can_be() -> None:
    """sum p_i B_i A_i - B A = p_1 p_2 (B_1 - B_2)(A_1 - A_2), of rank r; the stacked factors have rank 3 r."""
    fedex = FedExLoRA()
    [merge] = folded(fedex, fedex.server_init(WIDE, 0), [step(1), step(2)])["merges"].values()
    (a1, b1), (a2, b2) = ((array(s["q/A"]), array(s["q/B"])) for s in (step(1), step(2)))
    np.testing.assert_allclose(dense(merge, "q"), 3.0 * 2 / 9 * (b1 - b2) @ (a1 - a2), atol=1e-11)
    assert merge["q/A"].shape == (2, 31)
    assert float(merge["q/scale"]) == 3.0
    [merge] = folded(fedex, fedex.server_init(WIDE, 0), [step(k) for k in range(12)])["merges"].values()
    assert {name: tuple(value.shape) for name, value in merge.items()} == {"q/W": (40, 31)}  # 22 * 71 > 40 * 31
    means = {f: sum(k * array(step(k - 1)[f"q/{f}"]) for k in range(1, 13)) / 78 for f in "AB"}
    exact = sum(k * array(step(k - 1)["q/B"]) @ array(step(k - 1)["q/A"]) for k in range(1, 13)) / 78
    np.testing.assert_allclose(array(merge["q/W"]), 3.0 * (exact - means["B"] @ means["A"]), atol=1e-11)


def test_nothing_is_merged_where_nothing_is_missed() -> None:
    fedex = FedExLoRA()
    begun = fedex.server_init(WIDE, 0)
    assert folded(fedex, begun, [step(1)])["merges"] == {}  # one client
    assert (
        folded(fedex, begun, [{**step(1), "q/A": step(3)["q/A"]}, {**step(2), "q/A": step(3)["q/A"]}])["merges"] == {}
    )


def test_clients_train_the_average_on_the_changed_base() -> None:
    fedex, fake = FedExLoRA(extras=Extras(head="private")), Fake()
    state, _ = train(fedex, fedex.server_init(SPEC, 0), CLIENTS, memories={})
    assert fedex.server_model(state) is None
    payload = fedex.broadcast(state, CLIENTS[0], 2)
    update, memory = fake.run(fedex.client_update(payload, {}, local(CLIENTS[0], 2)))
    assert set(memory) == {"head/weight", "head/bias"}
    assert set(update.arrays) == {f"{site}/{f}" for site in SITES for f in "AB"}
    [order] = fake.log
    assert order.train == ("A", "B", "head")
    assert len(order.models.shared) == 1
    [(name, model)] = fake.run(fedex.personalize(payload, memory, local(CLIENTS[0], 2))).items()
    assert name == "personal"
    assert len(model.shared) == 1
    with pytest.raises(UserError, match=r"fedex-lora: ranks must be equal[\s\S]*flexlora"):
        fedex.broadcast(state, client("d", 2), 2)
