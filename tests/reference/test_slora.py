"""SLoRA: the mask, exact averages of the sparse change, the start of stage 2 by numpy's SVD, and the three ways on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.adapters.algebra import product
from fedlora.algorithms.fedit import FedIT
from fedlora.algorithms.slora import SLoRA, frame
from fedlora.errors import UserError
from fedlora.federation.spec import Extras, ModelSpec
from reference.fake import SITES, SPEC, Fake, array, client, close, dense, local, train

CLIENTS = [client("a", examples=10), client("b", examples=30), client("c", examples=60)]
SHARES = (0.1, 0.3, 0.6)
MIXED = [client("a", 1, 10), client("b", 2, 30), client("c", 4, 60)]
DENSE = 0.4  # of such small sites: 4 x 9 -> 4 x 4, 7 x 3 -> 3 x 3


def best(matrix: Any, rank: int) -> Any:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_the_mask_is_a_random_part_of_every_site_of_the_given_density() -> None:
    spec = ModelSpec({"q": (200, 50), "v": (30, 300)}, {"q": 4, "v": 4}, {}, (), 5)
    tree = frame(spec, 0.01, seed=0)
    for site, size in spec.sites.items():
        core = torch.ones_like(tree[f"{site}/C"])
        mask = product({**tree, f"{site}/C": core}, site)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert float(mask.sum()) / (size[0] * size[1]) == pytest.approx(0.01, rel=0.11)  # k is whole
        assert float(product(tree, site).abs().max()) == 0  # training starts at the base
    again, other = frame(spec, 0.01, seed=0), frame(spec, 0.01, seed=1)
    assert all(torch.equal(again[key], value) for key, value in tree.items())
    assert not torch.equal(other["q/A"], tree["q/A"])
    assert not torch.equal(tree["q/A"][:, :50].any(0), tree["v/A"][:, :50].any(0))
    assert frame(spec, 1.0, seed=0)["q/C"].shape == (50, 50)  # never more than the smaller side
    assert frame(spec, 1e-9, seed=0)["q/C"].shape == (1, 1)


def test_stage_1_trains_the_masked_numbers_and_averages_them_exactly() -> None:
    slora, fake = SLoRA(density=DENSE), Fake()
    begun = slora.server_init(SPEC, 0)
    payload = slora.broadcast(begun, CLIENTS[0], 1)
    assert {name: tuple(v.shape) for name, v in payload.items()} == {
        "down/sparse": (4, 4),
        "up/sparse": (3, 3),
        "head/weight": (3, 6),
        "head/bias": (3,),
    }
    fake.run(slora.client_update(payload, {}, local(CLIENTS[0])))
    assert fake.log[0].train == ("C", "head")
    masks = {
        s: array(product({**begun["sparse"], f"{s}/C": torch.ones_like(begun["sparse"][f"{s}/C"])}, s)) for s in SITES
    }
    total: Any = dict.fromkeys(SITES, 0.0)
    state = begun
    for round in (1, 2):
        state, updates = train(slora, state, CLIENTS, round=round)
        model = slora.server_model(state)
        assert model is not None
        for site in SITES:
            steps = [array(updates[c.id].arrays[f"{site}/sparse"]) for c in CLIENTS]
            rows, columns = (np.flatnonzero(masks[site].any(axis)) for axis in (1, 0))
            placed = np.zeros(SITES[site])
            placed[np.ix_(rows, columns)] = sum(p * x for p, x in zip(SHARES, steps))
            total[site] = total[site] + placed
            np.testing.assert_allclose(array(product(model.params, site)), total[site], atol=1e-12)
            assert (array(product(model.params, site))[masks[site] == 0] == 0).all()
    [(name, own)] = fake.run(slora.personalize(slora.broadcast(state, CLIENTS[1], 2), {}, local(CLIENTS[1], 2))).items()
    assert name == "sparse"
    close(product(own.params, "down"), total["down"])


@pytest.mark.parametrize("merge", ["average", "svd", "bucket"])
def test_stage_2_starts_from_the_best_approximation(merge: Any) -> None:
    slora = SLoRA(density=DENSE, sparse_rounds=2, merge=merge, bucket_rank=2 if merge == "bucket" else None)
    clients = CLIENTS if merge == "average" else [client("a", 2, 10), client("b", 2, 30), client("c", 4, 60)]
    begun = slora.server_init(SPEC, 0)
    middle, _ = train(slora, begun, clients)
    assert middle["sparse"] is not None
    state, updates = train(slora, middle, clients, round=2)
    assert state["sparse"] is None
    lost = slora.measures(state)
    for site in SITES:
        change = array(product(middle["sparse"], site))
        a, b = array(begun["sparse"][f"{site}/A"]), array(begun["sparse"][f"{site}/B"])
        step = sum(p * array(updates[c.id].arrays[f"{site}/sparse"]) for p, c in zip(SHARES, clients))
        change = change + b @ step @ a
        rank = {"average": SPEC.ranks[site], "svd": SPEC.ranks[site], "bucket": 2}[merge]
        for who in clients:
            served = slora.broadcast(state, who, 3)
            own = min(rank, who.ranks[site])
            np.testing.assert_allclose(dense(served, site), best(change, own), atol=1e-11)
            np.testing.assert_allclose(
                array(served[f"{site}/A"]) @ array(served[f"{site}/A"]).T, np.eye(own), atol=1e-11
            )
        error = np.linalg.norm(change - best(change, rank)) / np.linalg.norm(change)
        assert lost[f"start/{site}"] == pytest.approx(error, abs=1e-9)
        if merge == "svd":
            model = slora.server_model(state)
            assert model is not None
            np.testing.assert_allclose(array(product(model.shared[0], site)), change, atol=1e-11)


@pytest.mark.parametrize("merge", ["average", "svd", "bucket"])
def test_stage_2_is_fedit(merge: Any) -> None:
    options: Any = {"merge": merge, "bucket_rank": 2 if merge == "bucket" else None}
    slora, fedit = SLoRA(density=DENSE, sparse_rounds=1, **options), FedIT(**options)
    state, _ = train(slora, slora.server_init(SPEC, 0), CLIENTS)
    theirs = {**fedit.server_init(SPEC, 0), "merged": state["merged"]}
    after, updates = train(slora, state, CLIENTS, round=2)
    wanted, sent = train(fedit, theirs, CLIENTS, round=2)
    assert set(updates["a"].arrays) == set(sent["a"].arrays)
    for site in SITES:
        models = [slora.server_model(after), fedit.server_model(wanted)]
        one, two = (m.shared[0] if m.shared else m.params for m in models if m is not None)
        close(product(one, site), array(product(two, site)))
    close(
        slora.broadcast(after, CLIENTS[0], 3)["head/bias"], array(fedit.broadcast(wanted, CLIENTS[0], 3)["head/bias"])
    )


def test_a_last_sparse_round_without_replies_is_made_up_for() -> None:
    slora = SLoRA(density=DENSE, sparse_rounds=2)
    state, _ = train(slora, slora.server_init(SPEC, 0), CLIENTS)
    assert any(name.endswith("/sparse") for name in slora.broadcast(state, CLIENTS[0], 3))  # nobody answered in round 2
    state, _ = train(slora, state, CLIENTS, round=3)
    assert state["sparse"] is None
    assert set(slora.broadcast(state, CLIENTS[0], 4)) >= {"down/A", "down/B"}


def test_ranks_and_private_heads() -> None:
    slora = SLoRA()
    with pytest.raises(UserError, match=r"ranks must be equal[\s\S]*merge = 'svd'"):
        slora.broadcast(slora.server_init(SPEC, 0), client("d", 2), 1)  # in stage 1 already
    mixed, memories = SLoRA(density=DENSE, sparse_rounds=1, merge="svd", extras=Extras(head="private")), {}
    state = mixed.server_init(SPEC, 0)
    for round in (1, 2):
        state, updates = train(mixed, state, MIXED, round=round, memories=memories)
        assert set(memories["a"]) == {"head/weight", "head/bias"}
        assert not any(key.startswith("head/") for key in updates["a"].arrays)
        assert mixed.server_model(state) is None
    assert updates["a"].arrays["down/A"].shape == (1, 9)
    plain = SLoRA(sparse_rounds=0)
    assert plain.server_init(SPEC, 0)["sparse"] is None
