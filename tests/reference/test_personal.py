"""Ditto, FedPer, FedRep, FedRoD and FedAMP: what travels, what stays, and what is asked for, against numpy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.algorithms.ditto import Ditto
from fedlora.federation.spec import Extras
from reference.fake import SPEC, Fake, array, client, close, local, train

CLIENTS = [client("a", examples=10), client("b", examples=30), client("c", examples=60)]
SHARES = (0.1, 0.3, 0.6)
HEAD = {"head/weight", "head/bias"}


def params(order: Any) -> Any:
    return order.models.params


def test_ditto_averages_one_model_and_pulls_the_other_to_it() -> None:
    ditto, memories = Ditto(proximal=0.7), {}
    begun = ditto.server_init(SPEC, 0)
    state, updates = train(ditto, begun, CLIENTS, memories=memories)
    for key in updates["a"].arrays:
        close(
            state[key], array(begun[key]) + sum(p * array(updates[c.id].arrays[key]) for p, c in zip(SHARES, CLIENTS))
        )
    fake = Fake(seed=3)
    update, kept = fake.run(ditto.client_update(state, memories["b"], local(CLIENTS[1], 2)))
    averaged, personal = fake.log
    assert averaged.train == personal.train == ("A", "B", "head")
    assert averaged.proximal is None
    assert personal.proximal.strength == 0.7
    for key in update.arrays:
        assert torch.equal(params(averaged)[key], state[key])
        assert torch.equal(personal.proximal.anchor[key], state[key])  # what was received, not what was just trained
        assert torch.equal(params(personal)[key], memories["b"]["own"][key])  # goes on from its own
        assert not torch.equal(kept["own"][key], state[key] + update.arrays[key])  # what is sent is the other model
    models = fake.run(ditto.personalize(state, kept, local(CLIENTS[1], 2)))
    assert list(models) == ["personal", "global"]
    assert all(torch.equal(models["personal"].params[key], kept["own"][key]) for key in update.arrays)
    assert all(torch.equal(models["global"].params[key], state[key]) for key in update.arrays)
    assert ditto.server_model(state).params is state  # type: ignore[union-attr]


def test_ditto_of_newcomers_and_of_private_heads() -> None:
    ditto = Ditto(extras=Extras(head="private"))
    state, memories = ditto.server_init(SPEC, 0), {}
    state, updates = train(ditto, state, CLIENTS, memories=memories)
    assert not HEAD & (set(state) | set(updates["a"].arrays))
    assert ditto.server_model(state) is None
    kept = memories["a"]
    assert not torch.equal(kept["own"]["head/bias"], kept["private"]["head/bias"])  # one head for each model
    fake = Fake()
    models = fake.run(ditto.personalize(state, kept, local(CLIENTS[0], 2)))
    assert torch.equal(models["personal"].params["head/bias"], kept["own"]["head/bias"])
    assert torch.equal(models["global"].params["head/bias"], kept["private"]["head/bias"])
    _, nothing = fake.run(ditto.client_init(local(client("new"), 3)))
    new = fake.run(ditto.personalize(state, nothing, local(client("new"), 3)))
    assert all(torch.equal(new["personal"].params[key], state[key]) for key in state)
    fake.run(ditto.client_update(state, nothing, local(client("new"), 3)))
    assert all(torch.equal(params(fake.log[-1])[key], state[key]) for key in state)
    with pytest.raises(ValueError, match="ranks must be equal"):
        ditto.broadcast(state, client("d", 2), 2)
