"""FedDPA: the gate by numpy, what trains beside what is frozen, and clients that never trained."""

from __future__ import annotations

import numpy as np
import torch

from fedlora.algorithms.feddpa import FedDPA, Nearness
from fedlora.federation.spec import Extras
from reference.fake import SITES, SPEC, Fake, array, client, close, dense, local, train

RNG = np.random.default_rng(0)
FEATURES, LABELS = RNG.normal(size=(5, 6)), np.array([0, 2, 1, 2, 2])


def test_gate_by_cosines() -> None:
    reference = RNG.normal(size=(4, 6))
    found = Nearness(2.0)(torch.tensor(FEATURES), {"extra/reference": torch.tensor(reference)})
    for row, h in zip(array(found), FEATURES):
        cosine = np.mean([h @ r / np.linalg.norm(h) / np.linalg.norm(r) for r in reference])
        near = min(max(2 * cosine, 0), 1)
        np.testing.assert_allclose(row, [near, 1 - near], atol=1e-12)
    assert Nearness(0.5) == Nearness(0.5)


def test_trains_the_local_adapter_beside_the_frozen_global_one() -> None:
    dpa, who = FedDPA(references=2), client("a")
    fake = Fake(features=(torch.tensor(FEATURES), torch.tensor(LABELS)))
    _, memory = fake.run(dpa.client_init(local(who)))
    assert memory["reference"].shape == (2, 6)
    assert all(any(np.array_equal(row, h) for h in FEATURES) for row in array(memory["reference"]))
    state = dpa.server_init(SPEC, 0)
    assert not torch.equal(memory["own"]["up/A"], state["up/A"])
    update, after = fake.run(dpa.client_update(state, memory, local(who)))
    second = fake.log[2]
    [other] = second.models.others
    for site in SITES:
        sent = {f"{site}/{f}": state[f"{site}/{f}"] + update.arrays[f"{site}/{f}"] for f in "AB"}
        np.testing.assert_allclose(dense(other, site), dense({**sent, f"{site}/scale": state[f"{site}/scale"]}, site))
    assert second.models.weights is None
    assert torch.equal(second.models.params["up/A"], memory["own"]["up/A"])
    models = fake.run(dpa.personalize(state, after, local(who)))
    assert list(models) == ["gated", "sum", "global"]
    assert torch.equal(models["gated"].params["up/A"], after["own"]["up/A"])
    assert torch.equal(models["gated"].others[0]["up/A"], state["up/A"])


def test_mean_and_private_head() -> None:
    clients = [client("a", examples=10), client("b", examples=30)]
    dpa, memories = FedDPA(extras=Extras(head="private")), {}
    begun = dpa.server_init(SPEC, 0)
    for who in clients:
        _, memories[who.id] = Fake(features=(torch.tensor(FEATURES), torch.tensor(LABELS))).run(
            dpa.client_init(local(who))
        )
    state, updates = train(dpa, begun, clients, memories=memories)
    close(state["up/B"], 0.25 * array(updates["a"].arrays["up/B"]) + 0.75 * array(updates["b"].arrays["up/B"]))
    assert set(memories["a"]["private"]) == {"head/weight", "head/bias"}
    assert dpa.server_model(state) is None


def test_of_clients_that_never_trained() -> None:
    """Who was not drawn yet deploys the server's head, and the local one starts as the head that stands beside it."""
    dpa, me = FedDPA(), local(client("late"))
    begun = dpa.server_init(SPEC, 0)
    state = dpa.server_update(begun, {"head/bias": torch.ones_like(begun["head/bias"]).double()}, 1)
    _, memory = Fake(features=(torch.tensor(FEATURES), torch.tensor(LABELS))).run(dpa.client_init(me))
    fake = Fake()
    for model in fake.run(dpa.personalize(state, memory, me)).values():
        assert all(torch.equal(model.params[key], state[key]) for key in ("head/weight", "head/bias"))
    update, after = fake.run(dpa.client_update(state, memory, me))
    second = fake.log[-1]
    close(second.models.params["head/bias"], state["head/bias"] + update.arrays["head/bias"])
    assert not torch.equal(after["own"]["head/bias"], second.models.params["head/bias"])
    fake.run(dpa.client_update(state, after, me))
    assert torch.equal(fake.log[-1].models.params["head/bias"], after["own"]["head/bias"])  # its own now
    models = fake.run(dpa.personalize(state, after, me))
    assert torch.equal(models["gated"].params["head/bias"], after["own"]["head/bias"])
    assert torch.equal(models["global"].params["head/bias"], state["head/bias"])


def test_draws_its_references_from_all_examples() -> None:
    """A file sorted by class would else give every gate references of one class only."""
    rows = torch.arange(40.0)[:, None].expand(40, 6).double()
    found: list[list[float]] = []
    for name in ("a", "b"):
        fake = Fake(features=(rows, torch.arange(40) // 20))
        for round in (0, 7):
            _, memory = fake.run(FedDPA().client_init(local(client(name), round)))
            found.append(array(memory["reference"])[:, 0].tolist())
    assert found[0] == found[1]  # of the client alone, whenever it comes
    assert found[0] != found[2]
    assert all(len(set(rows)) == 5 and max(rows) > 4 for rows in found)
