"""Ditto, FedPer, FedRep, FedRoD and FedAMP: what travels, what stays, and what is asked for, against numpy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.algorithms.ditto import Ditto
from fedlora.algorithms.fedamp import FedAMP, attention
from fedlora.algorithms.fedper import FedPer
from fedlora.algorithms.fedrep import FedRep
from fedlora.algorithms.fedrod import BIAS, WEIGHT, FedRoD, both
from fedlora.algorithms.merging import start
from fedlora.errors import UserError
from fedlora.federation.orders import Batch, Outputs, Training
from fedlora.federation.spec import Extras
from reference.fake import SPEC, Fake, array, client, close, local, train

CLIENTS = [client("a", examples=10), client("b", examples=30), client("c", examples=60)]
SHARES = (0.1, 0.3, 0.6)
HEAD = {"head/weight", "head/bias"}
WORDS = replace(SPEC, whole={}, labels=())  # language modelling: no classes, no head


def params(order: Any) -> Any:
    return order.models.params


def expected(state: Any) -> set[str]:
    """What is sent of a served tree: all but the scales."""
    return {key for key in state if not key.endswith("/scale")}


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


def test_fedrep_trains_the_head_first_and_averages_the_rest() -> None:
    fedrep, memories = FedRep(head_epochs=7), {}
    begun = fedrep.server_init(SPEC, 0)
    assert not HEAD & set(begun)
    state, updates = train(fedrep, begun, CLIENTS, memories=memories)
    assert all(set(memory) == HEAD for memory in memories.values())
    for key in updates["a"].arrays:
        close(
            state[key], array(begun[key]) + sum(p * array(updates[c.id].arrays[key]) for p, c in zip(SHARES, CLIENTS))
        )
    fake = Fake(seed=3)
    update, kept = fake.run(fedrep.client_update(state, memories["b"], local(CLIENTS[1], 2)))
    first, second = fake.log
    assert (first.train, first.epochs) == (("head",), 7)
    assert (second.train, second.epochs) == (("A", "B"), fedrep.training.epochs)
    assert all(torch.equal(params(first)[key], state[key]) for key in state)
    assert all(torch.equal(params(first)[key], memories["b"][key]) for key in HEAD)
    for key in HEAD:  # the adapter is trained under the new head, which stays as it was then
        assert torch.equal(params(second)[key], kept[key])
        assert not torch.equal(kept[key], memories["b"][key])
    assert set(update.arrays) == expected(state)
    models = fake.run(fedrep.personalize(state, kept, local(CLIENTS[1], 2)))
    assert list(models) == ["personal"]
    assert {key: value.tolist() for key, value in models["personal"].params.items()} == {
        key: value.tolist() for key, value in {**state, **kept}.items()
    }
    assert len(fake.log) == 2  # a client with a head deploys without training


@pytest.mark.parametrize("algorithm", [FedPer, FedRep])
def test_newcomers_train_a_head_of_their_own_under_the_adapter(algorithm: Any) -> None:
    one, fake, me = algorithm(training=Training(schedule="linear")), Fake(), local(client("new"), 5, 5)
    state = one.server_init(SPEC, 0)
    models = fake.run(one.personalize(state, fake.run(one.client_init(me))[1], me))
    [order] = fake.log
    assert order.train == ("head",)
    assert order.optimizer == Training().optimizer  # at the full rate, also after the last round
    assert set(models["personal"].params) > HEAD
    assert all(torch.equal(models["personal"].params[key], state[key]) for key in state)


@pytest.mark.parametrize("algorithm", [FedPer, FedRep])
def test_private_heads_are_the_method(algorithm: Any) -> None:
    with pytest.raises(UserError, match="keeps every client's head at home"):
        algorithm(extras=Extras(head="share")).server_init(SPEC, 0)
    with pytest.raises(UserError, match="needs a task with labels"):
        algorithm().server_init(WORDS, 0)
    normed = algorithm(extras=Extras(head="private", norm="share"))
    state, updates = train(normed, normed.server_init(SPEC, 0), CLIENTS)
    assert "norm/gain" in updates["a"].arrays
    assert not HEAD & set(updates["a"].arrays)
    with pytest.raises(ValueError, match="ranks must be equal"):
        normed.broadcast(state, client("d", 2), 2)


def test_fedper_averages_what_is_below_the_head() -> None:
    """Two rounds by numpy: theta is the mean of what clients trained, every head is the client's own."""
    fedper, memories = FedPer(), {}
    state = fedper.server_init(SPEC, 0)
    assert set(state) == {key for key in start(SPEC, 0, Extras()) if key not in HEAD}
    for round in (1, 2):
        before, old = state, dict(memories)
        state, updates = train(fedper, before, CLIENTS, round=round, memories=memories)
        for key in expected(state):
            trained = [array(before[key]) + array(updates[c.id].arrays[key]) for c in CLIENTS]
            close(state[key], sum(p * t for p, t in zip(SHARES, trained)))
        assert all(set(memory) == HEAD for memory in memories.values())
        assert round == 1 or not any(torch.equal(memories[c.id]["head/bias"], old[c.id]["head/bias"]) for c in CLIENTS)
    fake = Fake()
    fake.run(fedper.client_update(state, memories["c"], local(CLIENTS[2], 3)))
    [order] = fake.log
    assert order.train == ("A", "B", "head")
    assert set(params(order)) == set(state) | HEAD
    assert all(torch.equal(params(order)[key], memories["c"][key]) for key in HEAD)
    [(name, model)] = fake.run(fedper.personalize(state, memories["c"], local(CLIENTS[2], 3))).items()
    assert name == "personal"
    assert all(torch.equal(model.params[key], {**state, **memories["c"]}[key]) for key in model.params)
    assert fedper.server_model(state) is None


COUNTS = {"red": 12, "blue": 3}  # no green


def test_fedrod_trains_two_terms_that_do_not_feel_each_other() -> None:
    """Values by numpy; gradients: the generic logits get the balanced term's, the personal head the plain one's."""
    rng = np.random.default_rng(0)
    g, z, labels = rng.normal(size=(5, 3)), rng.normal(size=(5, 6)), np.array([0, 2, 2, 0, 2])
    p, b = rng.normal(size=(3, 6)), rng.normal(size=3)
    fedrod, fake = FedRoD(), Fake()
    me = local(CLIENTS[0], counts=COUNTS)
    fake.run(fedrod.client_update(fedrod.server_init(SPEC, 0), fake.run(fedrod.client_init(me))[1], me))
    [order] = fake.log
    assert order.train == ("A", "B", "head", "extra/personal")
    assert dict(order.optimizer.lrs) == {"head": 2e-2, "extra/personal": 2e-2}
    held = {k: torch.tensor(v).requires_grad_() for k, v in {"logits": g, "features": z, WEIGHT: p, BIAS: b}.items()}
    own = {**params(order), WEIGHT: held[WEIGHT], BIAS: held[BIAS]}
    outputs = {"model": Outputs(held["logits"], held["features"])}
    losses = order.objective(outputs, {"model": own}, Batch(None, torch.tensor(labels)))
    losses.sum().backward()  # type: ignore[no-untyped-call]

    weighted = np.exp(g) * np.array([12, 0, 3])
    balanced = weighted / weighted.sum(1, keepdims=True)
    total = np.exp(g + z @ p.T + b)
    plain, truth, rows = total / total.sum(1, keepdims=True), np.eye(3)[labels], np.arange(5)
    close(losses, -np.log(balanced[rows, labels]) - np.log(plain[rows, labels]))
    close(held["logits"].grad, balanced - truth)  # type: ignore[arg-type]
    close(held[WEIGHT].grad, (plain - truth).T @ z)  # type: ignore[arg-type]
    close(held[BIAS].grad, (plain - truth).sum(0))  # type: ignore[arg-type]
    assert held["features"].grad is None
    close(both(outputs["model"], own), g + z @ p.T + b)


def test_fedrod_keeps_its_personal_head_and_averages_the_rest() -> None:
    fedrod, memories = FedRoD(), {}
    begun = fedrod.server_init(SPEC, 0)
    state, updates = train(fedrod, begun, CLIENTS, memories=memories)
    assert all(set(memory) == {WEIGHT, BIAS} for memory in memories.values())
    for key in updates["a"].arrays:
        trained = [array(begun[key]) + array(updates[c.id].arrays[key]) for c in CLIENTS]
        close(state[key], sum(p * t for p, t in zip(SHARES, trained)))
    assert set(updates["a"].arrays) == expected(begun) > HEAD
    fake, me = Fake(), local(CLIENTS[0], 2, counts=COUNTS)
    fake.run(fedrod.client_update(state, memories["a"], me))
    assert torch.equal(params(fake.log[0])[WEIGHT], memories["a"][WEIGHT])
    models = fake.run(fedrod.personalize(state, memories["a"], me))
    assert list(models) == ["personal", "generic"]
    assert models["personal"].predict is both
    assert models["generic"].params.keys() == state.keys()
    assert models["generic"].plain()["params"].keys() == fedrod.server_model(state).params.keys()  # type: ignore[union-attr]
    _, nothing = fake.run(fedrod.client_init(me))
    new = fake.run(fedrod.personalize(state, nothing, me))["personal"]
    logits, features = torch.randn(2, 3).double(), torch.randn(2, 6).double()
    assert torch.equal(new.predict(Outputs(logits, features), new.params), logits)  # zero: the generic model
    with pytest.raises(UserError, match="needs a task with labels"):
        fedrod.server_init(WORDS, 0)
    with pytest.raises(UserError, match="trains a generic head"):
        FedRoD(extras=Extras(head="frozen")).server_init(SPEC, 0)
    with pytest.raises(ValueError, match="ranks must be equal"):
        fedrod.broadcast(state, client("d", 2), 2)


def test_fedamp_mixes_by_distance_as_an_element_at_a_time() -> None:
    fedamp = FedAMP(sigma=0.5, step=0.8)
    state = fedamp.server_init(SPEC, 0)
    first, updates = train(fedamp, state, CLIENTS[:2], round=1)
    state, more = train(fedamp, first, CLIENTS[1:], round=2)  # a's last model is from round 1
    models = {name: u.arrays for name, u in {**updates, **more}.items()}
    flat = {name: np.concatenate([array(t[key]).ravel() for key in sorted(t)]) for name, t in models.items()}
    squared = {(i, j): sum((x - y) ** 2 for x, y in zip(flat[i], flat[j])) for i in flat for j in flat}
    scale = 0.5 * np.median([squared[pair] for pair in (("a", "b"), ("a", "c"), ("b", "c"))])
    for i in "abc":
        share = {j: 0.8 / 3 * math.exp(-squared[i, j] / scale) for j in "abc" if j != i}
        share[i] = 1 - sum(share.values())
        assert share[i] > 0.2
        served = fedamp.broadcast(state, client(i), 3)
        for key in models["a"]:
            close(served[key], sum(share[j] * array(models[j][key]) for j in "abc"))
        assert all(torch.equal(served[key], first["start"][key]) for key in served if key.endswith("/scale"))
    stranger = fedamp.broadcast(state, client("new"), 3)
    close(stranger["up/A"], sum(array(models[j]["up/A"]) for j in "abc") / 3)
    assert fedamp.server_model(state) is None


def test_fedamp_limits() -> None:
    """Equal models are averaged, far ones keep to themselves, two pairs of neighbours stay two pairs."""
    place = {"a": 0.0, "b": 0.1, "c": 50.0, "d": 50.1}
    pairs = attention({n: {"x": torch.full((2, 3), v)} for n, v in place.items()}, 0.01, 1.0)
    assert pairs["a"]["b"] == pytest.approx(0.25, rel=1e-3)
    assert pairs["a"]["a"] == pytest.approx(0.75, rel=1e-3)
    assert pairs["c"]["a"] < 1e-12
    equal = attention({name: {"x": torch.ones(2)} for name in "abcd"}, 1.0, 1.0)
    assert all(v == 0.25 for row in equal.values() for v in row.values())
    assert attention({"a": {"x": torch.ones(2)}}, 1.0, 1.0) == {"a": {"a": 1.0}}
    for wrong in ({"step": 1.5}, {"sigma": 0.0}):
        with pytest.raises(UserError, match="fedamp mixes with"):
            FedAMP(**wrong).server_init(SPEC, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ranks must be equal"):
        FedAMP().broadcast(FedAMP().server_init(SPEC, 0), client("d", 2), 1)


@pytest.mark.parametrize("head", ["share", "private"])
def test_fedamp_trains_from_its_cloud_and_deploys_its_own(head: Any) -> None:
    fedamp, memories = FedAMP(proximal=0.3, extras=Extras(head=head)), {}
    state, _ = train(fedamp, fedamp.server_init(SPEC, 0), CLIENTS, memories=memories)
    cloud, fake = fedamp.broadcast(state, CLIENTS[0], 2), Fake(seed=4)
    update, kept = fake.run(fedamp.client_update(cloud, memories["a"], local(CLIENTS[0], 2)))
    [order] = fake.log
    assert order.proximal.strength == 0.3
    for key in update.arrays:
        assert torch.equal(params(order)[key], cloud[key])
        assert torch.equal(order.proximal.anchor[key], cloud[key])
        assert torch.equal(update.arrays[key], kept[key])  # values: the server mixes them
    assert set(update.arrays) == expected(cloud)
    assert bool(HEAD & set(cloud)) == (head == "share")
    if head == "private":
        assert torch.equal(params(order)["head/bias"], memories["a"]["head/bias"])
    models = fake.run(fedamp.personalize(cloud, kept, local(CLIENTS[0], 3)))
    assert list(models) == ["personal", "cloud"]
    assert all(torch.equal(models["personal"].params[key], kept[key]) for key in kept)
    assert all(torch.equal(models["cloud"].params[key], cloud[key]) for key in cloud)
