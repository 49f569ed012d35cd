"""pFedLoRA, FML, FedProto and FedDPA: their losses, gates and means by numpy and scipy; what is frozen when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from fedlora.algorithms.feddpa import FedDPA, Nearness
from fedlora.algorithms.fedproto import Attracted, FedProto, nearest
from fedlora.algorithms.fml import FML, Mutual, divergence
from fedlora.algorithms.pfedlora import Both, Mix, PFedLoRA
from fedlora.federation.orders import Batch, Features, Outputs
from fedlora.federation.spec import Extras
from reference.fake import SITES, SPEC, Fake, array, client, close, dense, local, train

RNG = np.random.default_rng(0)
LOGITS, FEATURES, LABELS = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 6)), np.array([0, 2, 1, 2, 2])
OUT = Outputs(torch.tensor(LOGITS), torch.tensor(FEATURES))
BATCH = Batch(None, torch.tensor(LABELS))
PRIVATE = {"backbone/w": torch.ones(2, 5, dtype=torch.float64), **SPEC.start(0)}


def loss_of(logits: Any) -> Any:
    return -log_softmax(logits, axis=-1)[np.arange(5), LABELS]


# ---------------------------------------------------------------- pFedLoRA


def adapter() -> dict[str, Any]:
    return {"extra/A": torch.tensor(RNG.normal(size=(2, 6))), "extra/B": torch.tensor(RNG.normal(size=(3, 2)))}


def test_pfedlora_losses_and_mix() -> None:
    params = adapter()
    y_ad = np.array([array(params["extra/B"]) @ (array(params["extra/A"]) @ h) for h in FEATURES])
    found = Both(0.3)({"model": OUT}, {"model": params}, BATCH)
    close(found, 0.3 * loss_of(y_ad) + 0.7 * loss_of(LOGITS))
    close(Mix(0.3)(OUT, params), 0.7 * LOGITS + 0.3 * y_ad)
    assert Both(0.3) == Both(0.3)  # equal ones may share lanes


def test_pfedlora_phases_and_weighted_mean() -> None:
    pfed, memories = PFedLoRA(rank=2), {}
    begun = pfed.server_init(SPEC, 0)
    assert float(begun["extra/B"].abs().max()) == 0
    assert float(PFedLoRA(rank=200).server_init(SPEC, 0)["extra/A"].std()) == pytest.approx(6**-0.5, rel=0.1)
    who = client("a", backbone="cnn")
    fake = Fake(own={"cnn": PRIVATE})
    update, memories["a"] = fake.run(pfed.client_update(begun, {}, local(who)))
    first, second = fake.log
    assert (first.train, second.train) == (("backbone", "head"), ("extra",))
    assert first.models.backbone == second.models.backbone == "cnn"
    assert all(torch.equal(second.models.params[key], begun[key]) for key in begun)  # frozen in phase 1
    assert all(torch.equal(second.models.params[key], memories["a"][key]) for key in memories["a"])  # frozen in phase 2
    assert set(memories["a"]) == {"backbone/w", "head/weight", "head/bias"}
    assert set(update.arrays) == {"extra/A", "extra/B"}
    total = pfed.aggregator.zero()
    changes = {}
    for name, n in (("a", 10), ("b", 30)):
        one = client(name, examples=n, backbone="cnn")
        changes[name], _ = Fake(seed=n, own={"cnn": PRIVATE}).run(pfed.client_update(begun, {}, local(one)))
        total = pfed.aggregator.accumulate(total, one, changes[name])
    state = pfed.server_update(begun, pfed.aggregator.report(total), 1)
    by_hand = (
        array(begun["extra/A"])
        + 0.25 * array(changes["a"].arrays["extra/A"])
        + 0.75 * array(changes["b"].arrays["extra/A"])
    )
    close(state["extra/A"], by_hand)
    models = fake.run(pfed.personalize(state, memories["a"], local(who)))
    assert list(models) == ["local", "mix"]
    with pytest.raises(ValueError, match="labels"):
        pfed.server_init(replace(SPEC, labels=()), 0)


# ---------------------------------------------------------------- FML


def test_fml_divergence_is_scipys_and_the_teacher_is_not_taught() -> None:
    student, teacher = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 3))
    by_hand = [entropy(softmax(t), softmax(s)) for s, t in zip(student, teacher)]
    mine, other = (torch.tensor(x, requires_grad=True) for x in (student, teacher))
    found = divergence(mine, other)
    close(found, by_hand)
    found.sum().backward()
    assert other.grad is None
    close(mine.grad, softmax(student, -1) - softmax(teacher, -1))  # type: ignore[arg-type]
    tokens = divergence(
        mine[None].repeat(2, 1, 1), other[None].repeat(2, 1, 1), torch.tensor([[1, -100, 2, -100, 0], [-100] * 5])
    )
    close(tokens, [(by_hand[0] + by_hand[2] + by_hand[4]) / 3, 0.0])


def test_fml_loss_and_what_travels() -> None:
    other = RNG.normal(size=(5, 3))
    outputs = {"private": OUT, "shared": Outputs(torch.tensor(other), OUT.features)}
    kl = [[entropy(softmax(t), softmax(s)) for s, t in zip(x, y)] for x, y in ((LOGITS, other), (other, LOGITS))]
    by_hand = 0.2 * loss_of(LOGITS) + 0.8 * np.array(kl[0]) + 0.6 * loss_of(other) + 0.4 * np.array(kl[1])
    close(Mutual(0.2, 0.6)(outputs, {}, BATCH), by_hand)
    fml, who = FML(extras=Extras(head="private")), client("a", backbone="cnn")
    fake = Fake(own={"cnn": PRIVATE, "base": SPEC.start(0)})
    _, memory = fake.run(fml.client_init(local(who)))
    state = fml.server_init(SPEC, 0)
    update, memory = fake.run(fml.client_update(state, memory, local(who)))
    assert fake.log[0].train == {"private": ("backbone", "head"), "shared": ("A", "B", "head")}
    assert (
        set(update.arrays)
        == {f"{site}/{f}" for site in SITES for f in "AB"}
        == set(fml.expects(state, who, 1, "train"))
    )
    assert set(memory["private"]) == {"backbone/w", "head/weight", "head/bias"}
    assert set(memory["staying"]) == {"head/weight", "head/bias"}
    assert not torch.equal(memory["staying"]["head/bias"], memory["private"]["head/bias"])
    models = fake.run(fml.personalize(state, memory, local(who)))
    assert [(n, m.backbone) for n, m in models.items()] == [("private", "cnn"), ("shared", "base")]
    headless = replace(SPEC, whole={}, labels=())  # a language model
    fake.run(fml.client_update(fml.server_init(headless, 0), {"private": {}, "staying": {}}, local(who, spec=headless)))
    assert fake.log[-1].train == {"private": ("backbone",), "shared": ("A", "B")}


# ---------------------------------------------------------------- FedProto


def test_fedproto_loss_and_nearest() -> None:
    prototypes, known = RNG.normal(size=(3, 6)), np.array([1.0, 0.0, 1.0])
    params = {"extra/prototypes": torch.tensor(prototypes), "extra/known": torch.tensor(known)}
    pull = [known[y] * ((h - prototypes[y]) ** 2).mean() for h, y in zip(FEATURES, LABELS)]
    close(Attracted(0.7)({"model": OUT}, {"model": params}, BATCH), loss_of(LOGITS) + 0.7 * np.array(pull))
    by_hand = [min((0, 2), key=lambda c: ((h - prototypes[c]) ** 2).sum()) for h in FEATURES]
    assert nearest(OUT, params).argmax(1).tolist() == by_hand


def test_fedproto_prototypes_are_means_over_all_examples() -> None:
    proto = FedProto()
    state, total, seen = proto.server_init(SPEC, 0), proto.aggregator.zero(), []
    for name, labels in (("a", [0, 0, 2]), ("b", [0, 2, 2, 2, 2, 2])):
        rows = RNG.normal(size=(len(labels), 6))
        seen += list(zip(labels, rows))
        fake = Fake(own={"base": PRIVATE}, features=(torch.tensor(rows), torch.tensor(labels)))
        update, memory = fake.run(proto.client_update(state, {}, local(client(name, examples=len(labels)))))
        assert isinstance(fake.log[1], Features)
        assert "extra/known" not in memory
        total = proto.aggregator.accumulate(total, client(name), update)
    state = proto.server_update(state, proto.aggregator.report(total), 1)
    for c in (0, 2):
        close(state["extra/prototypes"][c], np.mean([h for y, h in seen if y == c], axis=0))
    assert state["extra/known"].tolist() == [1, 0, 1]
    later = proto.server_update(state, {"sum": torch.ones(3, 6), "count": torch.tensor([0.0, 2.0, 0.0])}, 2)
    close(later["extra/prototypes"][0], array(state["extra/prototypes"][0]), 0)
    close(later["extra/prototypes"][1], np.full(6, 0.5), 0)
    assert later["extra/known"].tolist() == [1, 1, 1]


# ---------------------------------------------------------------- FedDPA


def test_feddpa_gate_by_cosines() -> None:
    reference = RNG.normal(size=(4, 6))
    found = Nearness(2.0)(torch.tensor(FEATURES), {"extra/reference": torch.tensor(reference)})
    for row, h in zip(array(found), FEATURES):
        cosine = np.mean([h @ r / np.linalg.norm(h) / np.linalg.norm(r) for r in reference])
        near = min(max(2 * cosine, 0), 1)
        np.testing.assert_allclose(row, [near, 1 - near], atol=1e-12)
    assert Nearness(0.5) == Nearness(0.5)


def test_feddpa_trains_the_local_adapter_beside_the_frozen_global_one() -> None:
    dpa, who = FedDPA(references=2), client("a")
    fake = Fake(features=(torch.tensor(FEATURES), torch.tensor(LABELS)))
    _, memory = fake.run(dpa.client_init(local(who)))
    close(memory["reference"], FEATURES[:2], 0)
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


def test_feddpa_mean_and_private_head() -> None:
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
