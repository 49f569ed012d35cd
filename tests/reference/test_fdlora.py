"""FDLoRA: Nesterov by torch, the unweighted start, the syncs, the blend and its search."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.algorithms.fdlora import FDLoRA, search_from
from fedlora.errors import UserError
from fedlora.federation.orders import Fit, Model, Score
from fedlora.federation.spec import Extras
from reference.fake import SITES, SPEC, Fake, array, client, close, dense, local

CLIENTS = [client("a", examples=10), client("b", examples=30), client("c", examples=60)]
pytest.importorskip("cma")


def introduced(fdlora: FDLoRA) -> tuple[Any, dict[str, Any]]:
    state, total, memories = fdlora.server_init(SPEC, 0), fdlora.introduction.zero(), {}
    for seed, who in enumerate(CLIENTS):
        update, memories[who.id] = Fake(seed=seed).run(fdlora.client_init(local(who, 0)))
        assert set(update.arrays) == set(fdlora.expects(state, who, 0, "introduce"))
        total = fdlora.introduction.accumulate(total, who, update)
    return fdlora.server_introduce(state, fdlora.introduction.report(total), 0), memories


def test_starts_from_the_unweighted_mean_of_stage_one() -> None:
    fdlora = FDLoRA()
    state, memories = introduced(fdlora)
    for key in state["velocity"]:
        close(state["theta"][key], sum(array(m["personal"][key]) for m in memories.values()) / 3)
    late = fdlora.server_introduce(state, {key: torch.ones_like(v) for key, v in state["velocity"].items()}, 3)
    assert late is state
    assert FDLoRA.introduce_everyone


def test_outer_step_is_torch_nesterov() -> None:
    fdlora = FDLoRA(outer_lr=0.7, outer_momentum=0.4)
    state, _ = introduced(fdlora)
    theirs = {k: state["theta"][k].clone().requires_grad_() for k in state["velocity"]}
    optimizer = torch.optim.SGD(list(theirs.values()), lr=0.7, momentum=0.4, nesterov=True)
    for round in range(1, 6):
        stream = torch.Generator().manual_seed(round)
        change = {k: torch.randn(v.shape, generator=stream, dtype=v.dtype) for k, v in theirs.items()}
        for key, value in theirs.items():
            value.grad = -change[key]
        optimizer.step()
        state = fdlora.server_update(state, change, round)
        for key, value in theirs.items():
            close(state["theta"][key], array(value))


@pytest.mark.parametrize(("last", "synced"), [(False, [2]), (True, [2, 4])])
def test_syncs_every_h_of_its_own_rounds(last: bool, synced: list[int]) -> None:
    """The client is asked in rounds 1, 3, 4 and 6 of 6: its own second round is 3, its fourth the last."""
    fdlora = FDLoRA(sync_every=2, sync_last=last)
    state, memories = introduced(fdlora)
    memory, found = memories["a"], []
    for own, round in enumerate((1, 3, 4, 6), 1):
        fake = Fake(seed=round)
        before, payload = memory["personal"], fdlora.broadcast(state, CLIENTS[0], round)
        update, memory = fake.run(fdlora.client_update(payload, memory, local(CLIENTS[0], round, 6)))
        assert fake.log[0].split == "fit"  # never what the fusion scores
        assert update.weight == 1.0
        uploaded = {key: payload[key] + update.arrays[key] for key in update.arrays}
        if not torch.equal(memory["personal"]["up/A"], before["up/A"]):
            found.append(own)
            assert all(torch.allclose(memory["personal"][key], uploaded[key]) for key in uploaded)
    assert found == synced
    for nothing in (None, 0):  # a run file cannot say None
        never = FDLoRA(sync_every=nothing)
        _, kept = Fake().run(never.client_update(payload, memory, local(CLIENTS[0], 2, 6)))
        assert kept["personal"] is memory["personal"]


def test_blend_of_factors_and_of_products() -> None:
    fdlora = FDLoRA()
    state, memories = introduced(fdlora)
    personal, shared = memories["a"]["personal"], state["theta"]
    model = fdlora.blend(personal, shared, (0.8, -0.4))
    for site in SITES:
        a, b = (0.8 * array(personal[f"{site}/{f}"]) - 0.4 * array(shared[f"{site}/{f}"]) for f in "AB")
        close(torch.as_tensor(dense(model.params, site)), float(shared[f"{site}/scale"]) * b @ a)
    close(model.params["head/bias"], 2 / 3 * array(personal["head/bias"]) + 1 / 3 * array(shared["head/bias"]))
    beside = FDLoRA(fusion="product").blend(personal, shared, (0.8, -0.4))
    assert beside.weights == (0.8, -0.4)
    assert isinstance(beside.weights, tuple)
    for site in SITES:
        total = sum(w * dense(tree, site) for w, tree in zip(beside.weights, (beside.params, *beside.others)))
        by_hand = 0.8 * dense(personal, site) - 0.4 * dense(shared, site)
        np.testing.assert_allclose(total, by_hand, atol=1e-12)
    close(beside.params["head/bias"], array(model.params["head/bias"]))


def weights(model: Model, personal: Any, shared: Any) -> Any:
    """The point that a blended model was made of, by least squares."""
    columns = np.stack([array(t["up/A"]).ravel() for t in (personal, shared)], 1)
    return np.linalg.lstsq(columns, array(model.params["up/A"]).ravel(), rcond=None)[0]


def test_fusion_finds_the_minimum_of_loss_plus_penalty() -> None:
    """loss = 5 (w1 - 0.9)^2 + 5 (w2 - 0.3)^2 and lambda = 2: the minimum is at (0.7, 0.1)."""
    fdlora = FDLoRA(generations=25, penalty=2.0)
    state, memories = introduced(fdlora)
    personal, shared = memories["a"]["personal"], state["theta"]

    def loss(model: Model, split: str) -> tuple[float, float]:
        w = weights(model, personal, shared)
        return 8 * float(5 * ((w - [0.9, 0.3]) ** 2).sum()), 8.0

    np.random.seed(5)
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    fake = Fake(loss=loss)
    models = fake.run(fdlora.personalize(shared, memories["a"], local(CLIENTS[0], 5)))
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr]
    assert list(models) == ["fused", "personal", "global", "average"]
    np.testing.assert_allclose(weights(models["fused"], personal, shared), [0.7, 0.1], atol=0.01)
    np.testing.assert_allclose(weights(models["average"], personal, shared), [0.5, 0.5], atol=1e-9)
    assert all(isinstance(order, Score) and order.split == "holdout" for order in fake.log)
    first = [weights(order.model, personal, shared).round(6).tolist() for order in fake.log[:3]]
    assert first == [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]


def test_the_best_scored_point_wins_even_a_corner() -> None:
    fdlora = FDLoRA(generations=2)
    state, memories = introduced(fdlora)
    personal, shared = memories["a"]["personal"], state["theta"]

    def loss(model: Model, split: str) -> tuple[float, float]:
        return (0.0 if np.allclose(weights(model, personal, shared), [0, 1]) else 100.0), 10.0

    models = Fake(loss=loss).run(fdlora.personalize(shared, memories["a"], local(CLIENTS[0], 5)))
    assert all(torch.allclose(models["fused"].params[key], shared[key]) for key in shared)


def test_a_loss_that_is_no_number_never_wins() -> None:
    """A personal adapter that diverged in stage 1 is scored first, and nothing compares as less than nan."""
    fdlora = FDLoRA(generations=2)
    state, memories = introduced(fdlora)
    personal, shared = memories["a"]["personal"], state["theta"]

    def loss(model: Model, split: str) -> tuple[float, float]:
        return (np.nan if abs(weights(model, personal, shared)[0]) > 0.1 else 10.0), 10.0

    models = Fake(loss=loss).run(fdlora.personalize(shared, memories["a"], local(CLIENTS[0], 5)))
    assert abs(weights(models["fused"], personal, shared)[0]) <= 0.1


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize(("held_out", "split"), [(0, "train"), (3, "train"), (4, "holdout")])
def test_too_few_heldout_examples_fall_back_to_the_training_data(
    held_out: int, split: str, tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Examples are what is few, also where a loss is over their tokens."""
    fdlora = FDLoRA(generations=1, population=4)
    state, memories = introduced(fdlora)
    count = {"holdout": float(tokens * held_out), "train": 30.0}
    fake = Fake(loss=lambda model, split: (1.0, count[split]), tokens=tokens)
    with caplog.at_level("INFO"):
        fake.run(fdlora.personalize(state["theta"], memories["a"], local(CLIENTS[0], 5)))
    again = ["train"] * 3 if split == "train" else []
    assert [order.split for order in fake.log] == ["holdout"] * 4 + again + [split] * 4
    assert ("training data" in caplog.text) == (split == "train")


def test_a_generation_is_scored_together_and_defaults_are_the_paper_s() -> None:
    fdlora = FDLoRA()
    state, memories = introduced(fdlora)
    fake, sizes = Fake(loss=lambda model, split: (1.0, 9.0)), list[int]()

    def watched(work: Any) -> Any:
        answer = None
        while True:
            try:
                orders = work.send(answer)
            except StopIteration as end:
                return end.value
            sizes.append(len(orders))
            answer = yield orders

    fake.run(watched(fdlora.personalize(state["theta"], memories["a"], local(CLIENTS[0], 5))))
    assert sizes == [4] + [6] * 6
    training, inner = fdlora.training, fdlora.training.optimizer
    assert (training.epochs, inner.name, inner.lr, inner.weight_decay) == (3, "adamw", 2e-4, 0.0)
    assert (fdlora.outer_lr, fdlora.outer_momentum, fdlora.sync_every, fdlora.penalty) == (1.0, 0.5, 10, 0.05)
    strategy = search_from(0, 6)
    drawn = np.array([point for _ in range(50) for point in strategy.ask()])
    assert np.abs(drawn).max() <= 1.5


def test_private_heads_stay_on_both_adapters() -> None:
    fdlora = FDLoRA(extras=Extras(head="private"), generations=1)
    state, memories = introduced(fdlora)
    assert not any(key.startswith("head/") for key in state["theta"])
    assert fdlora.server_model(state) is None
    fake = Fake(seed=9)
    update, memory = fake.run(fdlora.client_update(state["theta"], memories["a"], local(CLIENTS[0])))
    assert isinstance(fake.log[0], Fit)
    assert torch.equal(fake.log[0].models.params["head/bias"], memories["a"]["personal"]["head/bias"])  # type: ignore[union-attr]
    assert not any(key.startswith("head/") for key in update.arrays)
    models = Fake(loss=lambda m, s: (1.0, 9.0)).run(fdlora.personalize(state["theta"], memory, local(CLIENTS[0], 5)))
    assert torch.equal(models["global"].params["head/bias"], memory["private"]["head/bias"])
    assert not torch.equal(models["personal"].params["head/bias"], memory["private"]["head/bias"])


def test_a_missing_library_is_missed_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    fake = Fake()
    with pytest.raises(UserError, match=r"fedlora\[fdlora\]"):
        fake.run(FDLoRA().client_init(local(CLIENTS[0], 0)))
    assert not fake.log


def test_mixed_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks must be equal"):
        Fake().run(FDLoRA().client_init(local(client("d", 2), 0)))
