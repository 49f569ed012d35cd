"""Local, head-only and pooled: what is trained on what, what is kept, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.algorithms.head_only import HeadOnly
from fedlora.algorithms.local import LocalOnly
from fedlora.algorithms.pooled import Pooled
from fedlora.errors import UserError
from fedlora.federation.spec import Extras
from reference.fake import SITES, SPEC, Fake, array, client, close, local, train

CLIENTS = [client("a", examples=10), client("b", examples=30), client("c", examples=60)]
SHARES = (0.1, 0.3, 0.6)


def alone(algorithm: LocalOnly, losses: list[tuple[float, float]]) -> tuple[list[Any], Any, Fake]:
    """The models after each round, the last memory, and the orders."""
    who, after, memory = client("a", 2), [], None
    fake = Fake(loss=lambda model, split: losses.pop(0))
    for round in range(1, len(losses) + 1):
        if memory is None:
            _, memory = fake.run(algorithm.client_init(local(who)))
        update, memory = fake.run(algorithm.client_update({}, memory, local(who, round)))
        assert update.arrays == {}
        after.append(memory["latest"])
    return after, memory, fake


def test_local_keeps_the_best_round_by_loss_per_example() -> None:
    after, memory, fake = alone(LocalOnly(), [(8.0, 4.0), (6.0, 4.0), (6.4, 4.0), (7.0, 2.0)])
    assert {order.split for order in fake.log} == {"fit", "holdout"}
    models = fake.run(LocalOnly().personalize({}, memory, local(client("a", 2))))
    assert list(models) == ["local", "latest"]
    assert all(torch.equal(models["local"].params[key], after[1][key]) for key in after[1])
    assert all(torch.equal(models["latest"].params[key], after[3][key]) for key in after[3])
    assert memory["loss"] == 1.5
    assert after[0]["down/A"].shape == (2, 9)  # its own rank
    orders = [order for order in fake.log if order.split == "fit"]
    assert torch.equal(orders[3].models.params["up/B"], after[2]["up/B"])  # goes on from the latest, not the best


def test_local_does_not_keep_a_model_without_a_loss() -> None:
    after, memory, _ = alone(LocalOnly(), [(math.nan, 4.0), (6.0, 4.0), (math.nan, 4.0)])
    assert all(torch.equal(memory["best"][key], after[1][key]) for key in after[1])
    assert memory["loss"] == 1.5


def test_local_without_heldout_examples_or_selection_deploys_the_latest() -> None:
    after, memory, _ = alone(LocalOnly(), [(0.0, 0.0)] * 3)
    assert all(torch.equal(memory["best"][key], after[2][key]) for key in after[2])
    fake = Fake()
    _, memory = fake.run(LocalOnly(select=False).client_init(local(client("a"))))
    fake.run(LocalOnly(select=False).client_update({}, memory, local(client("a"))))
    assert [order.split for order in fake.log] == ["train"]


def test_head_only_averages_heads_and_trains_no_site() -> None:
    probe = HeadOnly()
    state, updates = train(probe, probe.server_init(SPEC, 0), CLIENTS)
    assert set(state) == {"head/weight", "head/bias"}
    for key in state:
        close(
            state[key],
            array(SPEC.start(0)[key]) + sum(p * array(updates[c.id].arrays[key]) for p, c in zip(SHARES, CLIENTS)),
        )
    fake = Fake()
    fake.run(probe.client_update(state, {}, local(CLIENTS[0])))
    assert fake.log[0].train == ("head",)


def test_head_only_private_sends_nothing() -> None:
    probe, memories = HeadOnly(extras=Extras(head="private", norm="private")), {}
    state, updates = train(probe, probe.server_init(SPEC, 0), CLIENTS, memories=memories)
    assert state == {}
    assert all(update.arrays == {} for update in updates.values())
    assert probe.server_model(state) is None
    assert set(memories["b"]) == {"head/weight", "head/bias"}
    models = Fake().run(probe.personalize({}, memories["b"], local(CLIENTS[1])))
    assert torch.equal(models["personal"].params["head/weight"], memories["b"]["head/weight"])


def test_head_only_needs_labels_and_a_head_to_train() -> None:
    with pytest.raises(ValueError, match="needs a task with labels"):
        HeadOnly().server_init(replace(SPEC, labels=(), whole={}), 0)
    with pytest.raises(UserError, match="nothing but the head"):
        HeadOnly(extras=Extras(head="frozen")).server_init(SPEC, 0)


def test_pooled_trains_one_model_whatever_the_clients_ranks() -> None:
    pooled, everybody = Pooled(extras=Extras(head="private", norm="share")), client("everybody", 4, 100)
    begun = pooled.server_init(SPEC, 0)
    state, updates = train(pooled, begun, [everybody])
    assert {key.rsplit("/", 1)[0] for key in state} == {*SITES, "head", "norm"}
    for key, change in updates["everybody"].arrays.items():
        close(state[key], array(begun[key]) + array(change))
    model = pooled.server_model(state)
    assert torch.equal(model.params["head/weight"], state["head/weight"])
    assert pooled.broadcast(state, client("small", 1), 2) is state
    assert not Pooled.federated


def test_pooled_without_an_adapter_trains_the_head_alone() -> None:
    pooled = Pooled(adapter=False)
    begun = pooled.server_init(SPEC, 0)
    assert begun
    assert all(name.startswith("head/") for name in begun)
    state, updates = train(pooled, begun, [client("everybody", 4, 100)])
    sent = updates["everybody"].arrays
    assert sent.keys() == begun.keys()
    for name, value in state.items():
        close(value, array(begun[name]) + array(sent[name]))
    with pytest.raises(UserError, match="adapter = false needs a task with labels"):
        pooled.server_init(replace(SPEC, whole={}, labels=()), 0)
