"""FFA-LoRA, FedSA-LoRA and RoLoRA: which factor travels, and that its average is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.algorithms.fedsa_lora import FedSALoRA
from fedlora.algorithms.ffa_lora import FFALoRA
from fedlora.algorithms.rolora import RoLoRA
from fedlora.federation.spec import Extras
from reference.fake import SITES, SPEC, Fake, array, client, close, dense, local, train

CLIENTS = [client("a", examples=10), client("b", examples=30), client("c", examples=60)]
SHARES = (0.1, 0.3, 0.6)
HEAD = {"head/weight", "head/bias"}


def names(factor: str) -> set[str]:
    return {f"{site}/{factor}" for site in SITES}


def test_ffa_average_is_the_average_of_products() -> None:
    ffa = FFALoRA()
    begun = ffa.server_init(SPEC, 0)
    assert set(ffa.broadcast(begun, CLIENTS[0], 1)) == names("B") | HEAD
    fake = Fake()
    fake.run(ffa.client_update(ffa.broadcast(begun, CLIENTS[0], 1), {}, local(CLIENTS[0])))
    assert fake.log[0].train == ("B", "head")
    held = fake.log[0].models.params  # A_0 derives from the run's seed: the server's, bit for bit
    assert all(torch.equal(held[key], begun[key]) for key in begun)
    state, updates = train(ffa, begun, CLIENTS)
    assert all(set(update.arrays) == names("B") | HEAD for update in updates.values())
    for site in SITES:
        trained = [{**begun, f"{site}/B": updates[c.id].arrays[f"{site}/B"]} for c in CLIENTS]  # B starts at zero
        close(torch.as_tensor(dense(state, site)), sum(p * dense(t, site) for p, t in zip(SHARES, trained)))
        assert torch.equal(state[f"{site}/A"], begun[f"{site}/A"])


def test_fedsa_keeps_b_at_home() -> None:
    fedsa, memories = FedSALoRA(), {}
    begun = fedsa.server_init(SPEC, 0)
    assert set(fedsa.broadcast(begun, CLIENTS[0], 1)) == names("A") | HEAD
    state, updates = train(fedsa, begun, CLIENTS, memories=memories)
    assert all(set(update.arrays) == names("A") | HEAD for update in updates.values())
    assert all(set(memory) == names("B") for memory in memories.values())
    assert fedsa.server_model(state) is None
    for key in names("A"):
        trained = [array(begun[key]) + array(updates[c.id].arrays[key]) for c in CLIENTS]
        close(state[key], sum(p * t for p, t in zip(SHARES, trained)))
    fake, payload = Fake(), fedsa.broadcast(state, CLIENTS[1], 2)
    models = fake.run(fedsa.personalize(payload, memories["b"], local(CLIENTS[1])))
    assert list(models) == ["personal"]
    for site in SITES:
        mine = {
            f"{site}/A": state[f"{site}/A"],
            f"{site}/B": memories["b"][f"{site}/B"],
            f"{site}/scale": begun[f"{site}/scale"],
        }
        close(torch.as_tensor(dense(models["personal"].params, site)), dense(mine, site))
    fake.run(fedsa.client_update(payload, memories["b"], local(CLIENTS[1], 2)))
    assert torch.equal(fake.log[0].models.params["up/B"], memories["b"]["up/B"])  # goes on from its own B


def test_rolora_alternates_and_b_comes_first() -> None:
    rolora = RoLoRA()
    state = rolora.server_init(SPEC, 0)
    for round, factor, other in ((1, "B", "A"), (2, "A", "B"), (3, "B", "A")):
        before = state
        state, updates = train(rolora, before, CLIENTS, round=round)
        assert all(set(update.arrays) == names(factor) | HEAD for update in updates.values())
        for site in SITES:
            assert torch.equal(state[f"{site}/{other}"], before[f"{site}/{other}"])
            changed = [
                {**before, f"{site}/{factor}": before[f"{site}/{factor}"] + u.arrays[f"{site}/{factor}"]}
                for u in updates.values()
            ]
            close(torch.as_tensor(dense(state, site)), sum(p * dense(t, site) for p, t in zip(SHARES, changed)))
    fake = Fake()
    fake.run(rolora.client_update(state, {}, local(CLIENTS[0], 4)))
    assert fake.log[0].train == ("A", "head")


@pytest.mark.parametrize("algorithm", [FFALoRA, FedSALoRA, RoLoRA])
def test_private_heads_and_refused_ranks(algorithm: Any) -> None:
    private, memories = algorithm(extras=Extras(head="private")), {}
    state, updates = train(private, private.server_init(SPEC, 0), CLIENTS, memories=memories)
    assert not HEAD & set(updates["a"].arrays)
    assert set(memories["a"]) >= HEAD
    assert private.server_model(state) is None
    [(name, model)] = (
        Fake()
        .run(private.personalize(private.broadcast(state, CLIENTS[0], 2), memories["a"], local(CLIENTS[0])))
        .items()
    )
    assert name == "personal"
    assert torch.equal(model.params["head/bias"], memories["a"]["head/bias"])
    with pytest.raises(ValueError, match="ranks must be equal"):
        private.broadcast(state, client("d", 2), 2)
    frozen = algorithm(extras=Extras(head="frozen"))
    state, updates = train(frozen, frozen.server_init(SPEC, 0), CLIENTS)
    assert not any(key.startswith("head/") for key in {**state, **updates["a"].arrays})
