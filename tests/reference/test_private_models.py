"""pFedLoRA and its baselines: losses and means by numpy and scipy; what is frozen when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from fedlora.algorithms.distillation import divergence
from fedlora.algorithms.fedgh import FedGH
from fedlora.algorithms.fedkd import FedKD, adaptive, compressed, expanded, packed
from fedlora.algorithms.fedproto import Attracted, FedProto, nearest
from fedlora.algorithms.fml import FML, Mutual
from fedlora.algorithms.lg_fedavg import LGFedAvg
from fedlora.algorithms.pfedlora import Both, Mix, PFedLoRA
from fedlora.algorithms.standalone import Standalone
from fedlora.federation.admission import fits
from fedlora.federation.algorithm import Update
from fedlora.federation.orders import FORBIDDEN, Batch, Features, Outputs
from fedlora.federation.spec import Extras
from reference.fake import SITES, SPEC, Fake, array, client, close, local

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


def test_pfedlora_knows_only_the_clients_own_labels() -> None:
    """Its labels are 1 and 2: both losses and the mixture are over these, as if the first did not exist."""
    params, own = adapter(), np.array([1, 2])
    seen = np.array([2, 1, 2, 2, 1])
    out = Outputs(torch.tensor(np.where([True, False, False], FORBIDDEN, LOGITS)), OUT.features)
    y_ad = (FEATURES @ array(params["extra/A"]).T @ array(params["extra/B"]).T)[:, own]
    alone, through = (-log_softmax(y, axis=-1)[np.arange(5), seen - 1] for y in (LOGITS[:, own], y_ad))
    close(Both(0.3)({"model": out}, {"model": params}, Batch(None, torch.tensor(seen))), 0.3 * through + 0.7 * alone)
    for mu in (0.3, 1.0):
        mixed = array(Mix(mu)(out, params))
        close(mixed[:, own], (1 - mu) * LOGITS[:, own] + mu * y_ad)
        assert (mixed.argmax(1) != 0).all()


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
    for far in (1.0, 1e4):  # squares of distances may be large: an unknown class is never nearest
        by_hand = [min((0, 2), key=lambda c: ((far * h - prototypes[c]) ** 2).sum()) for h in FEATURES]
        assert nearest(replace(OUT, features=far * OUT.features), params).argmax(1).tolist() == by_hand


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
        assert update.arrays["rows"].shape == (2, 8)  # two of three classes are there: only those are sent
        assert fits(tuple(update.arrays["rows"].shape), proto.expects(state, client(name), 1, "train")["rows"])
        total = proto.aggregator.accumulate(total, client(name), update)
    state = proto.server_update(state, proto.aggregator.report(total), 1)
    for c in (0, 2):
        close(state["extra/prototypes"][c], np.mean([h for y, h in seen if y == c], axis=0))
    assert state["extra/known"].tolist() == [1, 0, 1]
    later = proto.server_update(state, {"1": torch.tensor([2.0, *[1.0] * 6])}, 2)
    close(later["extra/prototypes"][0], array(state["extra/prototypes"][0]), 0)
    close(later["extra/prototypes"][1], np.full(6, 0.5), 0)
    assert later["extra/known"].tolist() == [1, 1, 1]


# ---------------------------------------------------------------- Standalone and LG-FedAvg


def test_standalone_sends_nothing_and_goes_on_with_its_own() -> None:
    alone, who = Standalone(), client("a", backbone="cnn")
    fake = Fake(own={"cnn": PRIVATE})
    update, first = fake.run(alone.client_update({}, {}, local(who)))
    assert not update.arrays
    assert set(first) == {"backbone/w", "head/weight", "head/bias"}
    _, _ = fake.run(alone.client_update({}, first, local(who, round=2)))
    assert fake.log[1].train == ("backbone", "head")
    assert fake.log[1].models.params is first
    (model,) = fake.run(alone.personalize({}, first, local(who))).values()
    assert (model.params, model.backbone) == (first, "cnn")


def test_lg_fedavg_averages_heads_by_examples() -> None:
    shared, memories, sent = LGFedAvg(), {}, {}
    begun = shared.server_init(SPEC, 0)
    assert set(begun) == {"head/weight", "head/bias"}  # no norms
    total = shared.aggregator.zero()
    for name, n in (("a", 10), ("b", 30)):
        who, fake = client(name, examples=n, backbone="cnn"), Fake(seed=n, own={"cnn": PRIVATE})
        sent[name], memories[name] = fake.run(
            shared.client_update(begun, {"head/bias": -begun["head/bias"]}, local(who))
        )
        assert fake.log[0].train == ("backbone", "head")
        close(fake.log[0].models.params["head/bias"], array(begun["head/bias"]), 0)  # begins at what was received
        total = shared.aggregator.accumulate(total, who, sent[name])
    state = shared.server_update(begun, shared.aggregator.report(total), 1)
    for key in begun:
        close(state[key], 0.25 * array(memories["a"][key]) + 0.75 * array(memories["b"][key]))
    models = Fake().run(shared.personalize(state, memories["a"], local(client("a", backbone="cnn"))))
    assert list(models) == ["global-head", "own-head"]
    for name, head in (("global-head", state), ("own-head", memories["a"])):
        assert torch.equal(models[name].params["head/weight"], head["head/weight"])
        assert torch.equal(models[name].params["backbone/w"], memories["a"]["backbone/w"])


# ---------------------------------------------------------------- FedGH


def test_fedgh_trains_the_head_as_torch_does() -> None:
    gh = FedGH(lr=0.3, epochs=2)
    state, total, pairs = gh.server_init(SPEC, 0), gh.aggregator.zero(), []
    head = torch.nn.Linear(6, 3, dtype=torch.float64)
    head.load_state_dict({key.removeprefix("head/"): value for key, value in state.items()})
    for name, labels in (("b", [2, 2, 0]), ("a", [1, 2])):  # the server goes by ids
        rows = RNG.normal(size=(len(labels), 6))
        fake = Fake(own={"cnn": PRIVATE}, features=(torch.tensor(rows), torch.tensor(labels)))
        who = client(name, examples=len(labels), backbone="cnn")
        update, memory = fake.run(gh.client_update(state, {}, local(who)))
        assert fake.log[1].model.params["backbone/w"] is memory["backbone/w"]  # features of the trained model
        assert set(memory) == {"backbone/w", "head/weight", "head/bias"}
        total = gh.aggregator.accumulate(total, who, update)
        means = [(c, rows[[y == c for y in labels]].mean(0)) for c in sorted(set(labels))]
        pairs = means + pairs
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3)
    for c, mean in pairs * 2:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(torch.tensor(mean))[None], torch.tensor([c])).backward()
        optimizer.step()
    found = gh.server_update(state, gh.aggregator.report(total), 1)
    close(found["head/weight"], array(head.weight))
    close(found["head/bias"], array(head.bias))


@pytest.mark.parametrize("algorithm", [FedGH(), FedProto()])
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0, 2], [2, 3]], None),
        ([[7, 1]], "7 is none of 3 classes"),
        ([[-1, 1]], "-1 is none of 3 classes"),
        ([[0.5, 1]], "0.5 is none of 3 classes"),
        ([[1, 1], [1, 1]], "class 1 is there twice"),
        ([[1, 0]], "class 1 has 0 examples"),
        ([[1, 1e-35]], "class 1 has 1e-35 examples"),
        ([[0, 2], [2, 4]], "6 examples in rows, of 5"),
    ],
)
def test_rows_of_classes_that_are_none_are_refused(algorithm: Any, rows: list[list[float]], said: str | None) -> None:
    sent = Update({"rows": torch.cat([torch.tensor(rows, dtype=torch.float64), torch.ones(len(rows), 6)], 1)}, 5.0, {})
    assert algorithm.objection(algorithm.server_init(SPEC, 0), client("a"), sent, "train") == said


# ---------------------------------------------------------------- FedKD


def test_fedkd_loss_and_who_is_taught() -> None:
    logits, rows, by = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 6)), RNG.normal(size=(6, 6))
    params = {"shared": {"extra/map": torch.tensor(by)}}
    doubt = loss_of(LOGITS).mean() + loss_of(logits).mean()
    hidden = ((FEATURES - rows @ by.T) ** 2).mean(1)
    kl = [[entropy(softmax(t), softmax(s)) for s, t in zip(x, y)] for x, y in ((LOGITS, logits), (logits, LOGITS))]
    by_hand = loss_of(LOGITS) + loss_of(logits) + (np.array(kl[0]) + np.array(kl[1]) + hidden) / doubt
    own, other = (torch.tensor(x, requires_grad=True) for x in (LOGITS, logits))
    found = adaptive(
        {"private": Outputs(own, OUT.features), "shared": Outputs(other, torch.tensor(rows))}, params, BATCH
    )
    close(found, by_hand)
    found.sum().backward()  # the teacher learns from its own labels and from the student, doubt is a constant
    onehot = np.eye(3)[LABELS]
    close(own.grad, softmax(LOGITS, -1) - onehot + (softmax(LOGITS, -1) - softmax(logits, -1)) / doubt)  # type: ignore[arg-type]
    close(other.grad, softmax(logits, -1) - onehot + (softmax(logits, -1) - softmax(LOGITS, -1)) / doubt)  # type: ignore[arg-type]


def test_fedkd_of_one_label_has_bounded_steps() -> None:
    """A softmax over one label has no loss: what is left is divided by the least D."""
    one = Batch(BATCH.inputs, torch.zeros_like(BATCH.labels))
    scores, rows = torch.ones(len(LABELS), 1, dtype=torch.float64), torch.tensor(FEATURES + 1.0)
    found = adaptive(
        {"private": Outputs(scores, OUT.features), "shared": Outputs(scores, rows)},
        {"shared": {"extra/map": torch.eye(6, dtype=torch.float64)}},
        one,
    )
    close(found, np.full(len(LABELS), 1 / 0.01))  # hidden is 1


def test_fedkd_sends_the_fewest_singular_vectors() -> None:
    spectrum = np.array([4.0, 2.0, 1.0, 0.5])
    q, p = (np.linalg.qr(RNG.normal(size=(n, 4)))[0] for n in (7, 5))
    matrix = q @ np.diag(spectrum) @ p.T
    for share, rank in ((0.5, 1), (0.8, 2), (0.95, 3), (0.999, 4), (1.0, 4)):
        left, right = compressed(torch.tensor(matrix), share)
        assert left.shape[0] == right.shape[0] == rank
        close(left.T @ right, q[:, :rank] @ np.diag(spectrum[:rank]) @ p[:, :rank].T)
    nothing = compressed(torch.zeros(3, 2), 0.9)
    assert [tuple(part.shape) for part in nothing] == [(1, 3), (1, 2)]
    sent = packed("conv", torch.tensor(matrix).reshape(7, 5, 1, 1), 1.0)
    assert set(sent) == {"conv:left", "conv:right"}
    close(expanded(sent)["conv"], matrix)
    assert set(packed("bias", torch.ones(3), 0.9)) == {"bias"}
    broken = {"x:left": torch.ones(3, 2), "x:right": torch.ones(1, 4)}
    assert expanded(broken)["x"].shape == (2, 4)


def test_fedkd_rounds() -> None:
    kd, sent, memories = FedKD(energy=0.4, last_energy=0.9, extras=Extras(head="share", norm="share")), {}, {}
    state = kd.server_init(SPEC, 0)
    total = kd.aggregator.zero()
    for name, n in (("a", 10), ("b", 30)):
        who, fake = client(name, examples=n, backbone="cnn"), Fake(seed=n, own={"cnn": PRIVATE, "base": SPEC.start(0)})
        _, first = fake.run(kd.client_init(local(who)))
        close(first["staying"]["extra/map"], np.eye(6), 0)
        sent[name], memories[name] = fake.run(kd.client_update({}, first, local(who, round=2, rounds=5)))
        assert fake.log[0].train == {"private": ("backbone", "head"), "shared": ("A", "B", "extra", "head", "norm")}
        expected = kd.expects(state, who, 2, "train")
        assert set(expected) == set(sent[name].arrays)
        assert all(fits(tuple(sent[name].arrays[key].shape), shape) for key, shape in expected.items())
        assert float(sent[name].arrays["energy"]) == pytest.approx(0.4 + 0.5 * 2 / 5)
        assert set(memories[name]["staying"]) == {"extra/map"}
        assert not torch.equal(memories[name]["staying"]["extra/map"], first["staying"]["extra/map"])
        total = kd.aggregator.accumulate(total, who, sent[name])
    after = kd.server_update(state, kd.aggregator.report(total), 2)

    def product(update: Any, key: str) -> Any:
        return array(update.arrays[f"{key}:left"]).T @ array(update.arrays[f"{key}:right"])

    for key in ("down/A", "up/B", "head/weight"):
        mean = 0.25 * product(sent["a"], key) + 0.75 * product(sent["b"], key)
        u, s, vh = np.linalg.svd(mean, full_matrices=False)
        rank = next(k for k in range(1, 9) if (s[:k] ** 2).sum() >= 0.6 * (s**2).sum())
        close(after["student"][key], array(state["student"][key]) + (u[:, :rank] * s[:rank]) @ vh[:rank])
    gain = 0.25 * array(sent["a"].arrays["norm/gain"]) + 0.75 * array(sent["b"].arrays["norm/gain"])
    close(after["student"]["norm/gain"], array(state["student"]["norm/gain"]) + gain)  # vectors travel as they are
    close(after["student"]["down/scale"], array(state["student"]["down/scale"]), 0)
    payload = kd.broadcast(after, client("a"), 3)  # only the compressed change: the start is everybody's
    assert payload["000002:norm/gain"].shape == (6,)
    assert payload["000002:down/A:left"].shape == (len(payload["000002:down/A:right"]), 4)
    models = Fake().run(kd.personalize(payload, memories["a"], local(client("a", backbone="cnn"))))
    assert all(torch.equal(models["shared"].params[key], value) for key, value in after["student"].items())
    assert [(n, m.backbone) for n, m in models.items()] == [("private", "cnn"), ("shared", "base")]
    whole = replace(
        SPEC, sites={}, ranks={}, whole={**SPEC.whole, "backbone/conv": (4, 2, 3, 3)}
    )  # no sites: all of it
    kd = FedKD(extras=Extras(backbone="share"))
    fake = Fake(own={"cnn": PRIVATE, "base": whole.start(0)})
    who, begun = client("a", backbone="cnn"), kd.server_init(whole, 0)
    _, first = fake.run(kd.client_init(local(who, spec=whole)))
    update, _ = fake.run(kd.client_update({}, first, local(who, spec=whole)))
    assert fake.log[0].train["shared"] == ("extra", "head", "backbone")
    assert update.arrays["backbone/conv:right"].shape[1] == 18
    moved = kd.server_update(
        begun, kd.aggregator.report(kd.aggregator.accumulate(kd.aggregator.zero(), who, update)), 1
    )
    assert moved["student"]["backbone/conv"].shape == (4, 2, 3, 3)
