"""FLoRA: dense sums, merged round after round; what a client that missed rounds receives; fresh starts."""

from __future__ import annotations

import torch

from fedlora.algorithms.flora import FLoRA, received
from fedlora.federation.spec import Extras
from reference.fake import SITES, SPEC, Fake, array, client, close, dense, local, train

MIXED = [client("a", 1, 10), client("b", 2, 30), client("c", 4, 60)]
SHARES = (0.1, 0.3, 0.6)


def test_merges_are_exact_and_all_of_them_arrive() -> None:
    flora = FLoRA()
    state, total = flora.server_init(SPEC, 0), dict.fromkeys(SITES, 0.0)
    for round in (1, 2, 11):
        state, updates = train(flora, state, MIXED, round=round)
        for site in SITES:
            total[site] = total[site] + sum(p * dense(updates[c.id].arrays, site) for p, c in zip(SHARES, MIXED))
    model = flora.server_model(state)
    assert model is not None
    merges = received(flora.broadcast(state, client("d", 2), 12))[1]
    assert len(merges) == len(model.shared) == 3
    for shared in (model.shared, merges):
        for site in SITES:
            held = [array(m[f"{site}/W"]) if f"{site}/W" in m else dense(m, site) for m in shared]
            close(torch.as_tensor(sum(held)), total[site])
    for held, arrived in zip(model.shared, merges):  # by reference, in order
        assert set(held) == set(arrived)
        assert all(held[key] is arrived[key] for key in held)
    [(name, own)] = Fake().run(flora.personalize(flora.broadcast(state, MIXED[0], 12), {}, local(MIXED[0]))).items()
    assert name == "merged"
    assert not any(key.endswith("/A") for key in own.params)


def test_fresh_starts_are_shared_and_new_every_round() -> None:
    flora = FLoRA()
    state, seen = flora.server_init(SPEC, 0), {}
    for who in MIXED[1:]:
        for round in (1, 2):
            fake = Fake()
            fake.run(flora.client_update(flora.broadcast(state, who, round), {}, local(who, round)))
            seen[who.id, round] = fake.log[0].models.params
    assert torch.equal(seen["b", 1]["down/A"], seen["c", 1]["down/A"][:2])
    assert not torch.equal(seen["b", 1]["down/A"], seen["b", 2]["down/A"])
    assert float(seen["c", 2]["down/B"].abs().max()) == 0


def test_head_mean_and_private_head() -> None:
    flora = FLoRA()
    state, updates = train(flora, flora.server_init(SPEC, 0), MIXED)
    close(state["whole"]["head/bias"], sum(p * array(updates[c.id].arrays["head/bias"]) for p, c in zip(SHARES, MIXED)))
    private, memories = FLoRA(extras=Extras(head="private")), {}
    state, updates = train(private, private.server_init(SPEC, 0), MIXED, memories=memories)
    assert set(memories["a"]) == {"head/weight", "head/bias"}
    assert private.server_model(state) is None
    assert not any(key.startswith("head/") for key in updates["a"].arrays)
