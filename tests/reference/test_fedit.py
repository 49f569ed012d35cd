"""FedIT's numbers: weighted means by numpy, server optimisers by torch, priors by fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.algorithms.fedit import FedIT
from fedlora.algorithms.flexlora import FlexLoRA
from fedlora.errors import UserError
from fedlora.federation.orders import Fit, Optimizer, Outputs, Training
from fedlora.federation.spec import Extras
from reference.fake import LABELS, SITES, SPEC, Fake, array, client, close, dense, local, train

CLIENTS = [client("a", examples=10), client("b", examples=30), client("c", examples=60)]
SHARES = (0.1, 0.3, 0.6)


def test_factors_and_head_are_weighted_means() -> None:
    fedit = FedIT()
    begun = fedit.server_init(SPEC, 0)
    state, updates = train(fedit, begun, CLIENTS)
    assert set(updates["a"].arrays) == {f"{s}/{f}" for s in SITES for f in "AB"} | {"head/weight", "head/bias"}
    for key, before in begun["merged"].items():
        if key.endswith("/scale"):
            assert state["merged"][key] == before
        else:
            trained = [array(before) + array(updates[c.id].arrays[key]) for c in CLIENTS]
            close(state["merged"][key], sum(p * t for p, t in zip(SHARES, trained)))


def test_by_how_much_the_average_of_factors_misses_the_average_of_products() -> None:
    """With two clients: sum p_i s B_i A_i - s B A = p_1 p_2 s (B_1 - B_2)(A_1 - A_2), here 37 % and 31 % of the sum."""
    fedit, pair = FedIT(), CLIENTS[1:]
    begun = fedit.server_init(SPEC, 0)
    state, updates = train(fedit, begun, pair)
    sizes = {}
    for site in SITES:
        s = float(begun["merged"][f"{site}/scale"])
        held = [
            {f: array(begun["merged"][f"{site}/{f}"] + updates[c.id].arrays[f"{site}/{f}"]) for f in "AB"} for c in pair
        ]
        exact = s * (held[0]["B"] @ held[0]["A"] / 3 + held[1]["B"] @ held[1]["A"] * 2 / 3)
        missed = exact - dense(state["merged"], site)
        by_hand = s * 2 / 9 * (held[0]["B"] - held[1]["B"]) @ (held[0]["A"] - held[1]["A"])
        np.testing.assert_allclose(missed, by_hand, atol=1e-12)
        sizes[site] = float(np.linalg.norm(missed) / np.linalg.norm(exact))
    assert sizes == pytest.approx({"down": 0.369, "up": 0.315}, abs=0.001)


def rounds_of(fedit: FedIT, count: int = 5) -> Any:
    """(before, change, after) of rounds with random mean differences."""
    state = fedit.server_init(SPEC, 0)
    for round in range(1, count + 1):
        stream = torch.Generator().manual_seed(round)
        keys = [k for k in state["merged"] if not k.endswith("/scale")]
        change = {k: torch.randn(state["merged"][k].shape, generator=stream, dtype=torch.float64) for k in keys}
        after = fedit.server_update(state, change, round)
        yield state, change, after
        state = after


def test_avgm_is_torch_sgd_with_momentum() -> None:
    fedit, theirs = FedIT(server="avgm", server_lr=0.7, server_momentum=0.8), None
    for state, change, after in rounds_of(fedit):
        if theirs is None:
            theirs = {k: state["merged"][k].clone().requires_grad_() for k in change}
            optimizer = torch.optim.SGD(list(theirs.values()), lr=0.7, momentum=0.8)
        for key, value in theirs.items():
            value.grad = -change[key]
        optimizer.step()
        for key, value in theirs.items():
            close(after["merged"][key], array(value))


def test_adam_is_torch_adam_without_bias_correction() -> None:
    """torch steps by lr (m / c1) / (sqrt(v / c2) + eps); with lr c1 / sqrt(c2), eps / sqrt(c2) the corrections go."""
    fedit, theirs = FedIT(server="adam", server_lr=0.05, server_betas=(0.8, 0.95), server_tau=0.01), None
    for step, (state, change, after) in enumerate(rounds_of(fedit), 1):
        if theirs is None:
            theirs = {k: state["merged"][k].clone().requires_grad_() for k in change}
            optimizer = torch.optim.Adam(list(theirs.values()), betas=(0.8, 0.95))
            for value in theirs.values():  # v starts at tau^2
                begun = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.full_like(value, 0.01**2)}
                optimizer.state[value] = {"step": torch.tensor(0.0), **begun}
        for key, value in theirs.items():
            value.grad = -change[key]
        c1, c2 = 1 - 0.8**step, 1 - 0.95**step
        optimizer.param_groups[0].update(lr=0.05 * c1 / math.sqrt(c2), eps=0.01 / math.sqrt(c2))
        optimizer.step()
        for key, value in theirs.items():
            close(after["merged"][key], array(value))


def test_yogi_number_by_number() -> None:
    fedit = FedIT(server="yogi", server_lr=0.05, server_betas=(0.8, 0.95), server_tau=0.01)
    x = m = 0.0
    v = 0.01**2
    for round, (state, change, after) in enumerate(rounds_of(fedit, 8), 1):
        if round == 1:
            x = float(state["merged"]["up/A"][1, 2])
        d = float(change["up/A"][1, 2])
        m = 0.8 * m + 0.2 * d
        v = v - 0.05 * d * d if v > d * d else v + 0.05 * d * d
        x += 0.05 * m / (math.sqrt(v) + 0.01)
        assert float(after["merged"]["up/A"][1, 2]) == pytest.approx(x, abs=1e-12)


def test_moments_are_float64_and_what_is_served_is_not() -> None:
    from dataclasses import replace

    spec = replace(SPEC, dtype=torch.float32)
    fedit = FedIT(server="adam")
    state, _ = train(fedit, fedit.server_init(spec, 0), CLIENTS, spec=spec)
    assert {t.dtype for t in state["moments"]["v"].values()} == {torch.float64}
    assert {t.dtype for t in fedit.broadcast(state, CLIENTS[0], 2).values()} == {torch.float32}


def test_merge_svd_is_flexlora_and_has_no_factors_to_step_along() -> None:
    mixed = [client("a", 1, 10), client("b", 2, 30), client("c", 4, 60)]
    by_merge, _ = train(FedIT(merge="svd"), FedIT(merge="svd").server_init(SPEC, 0), mixed)
    itself, _ = train(FlexLoRA(), FlexLoRA().server_init(SPEC, 0), mixed)
    for key, value in itself["served"].items():
        close(by_merge["merged"]["served"][key], array(value), 0)
    with pytest.raises(UserError, match="merge = 'svd' has none"):
        FedIT(merge="svd", server="adam").server_init(SPEC, 0)


def test_bucket_holds_everyone_at_the_smallest_rank() -> None:
    mixed = [client("a", 2, 10), client("b", 4, 30)]
    fedit = FedIT(merge="bucket", bucket_rank=2)
    begun = fedit.server_init(SPEC, 0)
    assert begun["merged"]["down/A"].shape == (2, 9)
    close(begun["merged"]["down/A"], array(SPEC.adapter(SPEC.ranks, 0)["down/A"][:2]), 0)
    assert float(begun["merged"]["down/scale"]) == 6.0 / 4  # shared scale: alpha over the largest rank of the run
    state, updates = train(fedit, begun, mixed)
    by_hand = array(begun["merged"]["up/B"]) + sum(
        p * array(updates[n].arrays["up/B"]) for n, p in (("a", 0.25), ("b", 0.75))
    )
    close(state["merged"]["up/B"], by_hand)
    with pytest.raises(ValueError, match="bucket_rank = 1"):
        fedit.broadcast(state, client("d", 1), 2)
    with pytest.raises(ValueError, match="set bucket_rank"):
        FedIT(merge="bucket").server_init(SPEC, 0)


def test_mixed_ranks_are_refused_by_name() -> None:
    fedit = FedIT()
    with pytest.raises(ValueError, match=r"ranks must be equal.*'d' has rank 2 at 'down', the server 4[\s\S]*flexlora"):
        fedit.broadcast(fedit.server_init(SPEC, 0), client("d", 2), 1)


def test_proximal_pulls_to_what_was_received() -> None:
    fedit, fake = FedIT(proximal=0.3), Fake()
    payload = fedit.broadcast(fedit.server_init(SPEC, 0), CLIENTS[0], 1)
    fake.run(fedit.client_update(payload, {}, local(CLIENTS[0])))
    near = fake.log[0].proximal
    assert near.strength == 0.3
    assert set(near.anchor) == {k for k in payload if not k.endswith("/scale")}
    assert all(torch.equal(near.anchor[k], payload[k]) for k in near.anchor)
    fake.run(FedIT().client_update(payload, {}, local(CLIENTS[0])))
    assert fake.log[1].proximal is None
    private = FedIT(proximal=0.3, extras=Extras(head="private"))
    payload, own = private.broadcast(private.server_init(SPEC, 0), CLIENTS[0], 1), SPEC.start(1)
    fake.run(private.client_update(payload, {"head/bias": own["head/bias"]}, local(CLIENTS[0])))
    assert not any(key.startswith("head/") for key in fake.log[2].proximal.anchor)  # nobody pulls at what is private


@pytest.mark.parametrize("head", ["share", "private", "frozen"])
def test_heads_travel_stay_or_rest(head: Any) -> None:
    fedit, memories = FedIT(extras=Extras(head=head)), {}
    state, updates = train(fedit, fedit.server_init(SPEC, 0), CLIENTS[:1], memories=memories)
    sent = {k for k in updates["a"].arrays if k.startswith("head/")}
    assert sent == ({"head/weight", "head/bias"} if head == "share" else set())
    assert set(memories["a"]) == ({"head/weight", "head/bias"} if head == "private" else set())
    assert (fedit.server_model(state) is None) == (head == "private")
    [(name, model)] = (
        Fake().run(fedit.personalize(fedit.broadcast(state, CLIENTS[0], 1), memories["a"], local(CLIENTS[0]))).items()
    )
    assert name == ("personal" if head == "private" else "global")
    assert ("head/weight" in model.params) == (head != "frozen")
    if head == "private":
        assert not torch.equal(model.params["head/weight"], SPEC.start(0)["head/weight"])


COUNTS = {"a": {"red": 8, "green": 2}, "b": {"green": 15, "blue": 15}, "c": {"red": 60}}


def smoothed(who: str) -> list[Fraction]:
    counts = [Fraction(COUNTS[who].get(label, 0)) + Fraction(1, 2) for label in LABELS]
    return [c / sum(counts) for c in counts]


def test_prior_by_fractions() -> None:
    fedit = FedIT(prior=True)
    state = fedit.server_init(SPEC, 0)
    for round, cohort in ((1, CLIENTS), (2, CLIENTS[1:])):
        total = fedit.aggregator.zero()
        for who in cohort:
            mine = local(who, round, counts=COUNTS[who.id])
            update, _ = Fake().run(fedit.client_update(fedit.broadcast(state, who, round), {}, mine))
            assert set(update.arrays) == set(fedit.expects(state, who, round, "train"))
            total = fedit.aggregator.accumulate(total, who, update)
        state = fedit.server_update(state, fedit.aggregator.report(total), round)
    first = [
        sum(p * smoothed(c.id)[k] for p, c in zip((Fraction(1, 10), Fraction(3, 10), Fraction(6, 10)), CLIENTS))
        for k in range(3)
    ]
    second = [Fraction(1, 3) * smoothed("b")[k] + Fraction(2, 3) * smoothed("c")[k] for k in range(3)]
    mean = [(x + y) / 2 for x, y in zip(first, second)]
    close(state["share"], [float(x) for x in mean])

    payload = fedit.broadcast(state, CLIENTS[0], 3)
    variants = Fake().run(fedit.personalize(payload, {}, local(CLIENTS[0], 3, counts=COUNTS["a"])))
    assert list(variants) == ["prior", "global"]
    logits = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    shifted = variants["prior"].predict(Outputs(logits, logits), variants["prior"].params)
    by_hand = [z + math.log(own / other) for z, own, other in zip((1.0, -2.0, 0.5), smoothed("a"), mean)]
    close(shifted[0], by_hand)
    assert not any(key.startswith("extra/") for key in variants["global"].params)
    assert not any(key.startswith("extra/") for key in fedit.server_model(state).params)  # type: ignore[union-attr]


def test_prior_survives_server_optimisers_and_svd() -> None:
    for options in ({"server": "adam"}, {"merge": "svd"}, {"merge": "bucket", "bucket_rank": 4}):
        fedit = FedIT(prior=True, **options)  # type: ignore[arg-type]
        state, _ = train(fedit, fedit.server_init(SPEC, 0), CLIENTS)
        close(state["share"], [1 / 3] * 3)  # nobody has counts here: half a count each


def test_finetuning_is_first_and_at_full_rate() -> None:
    training = Training(epochs=1, optimizer=Optimizer(lr=0.2), schedule="linear")
    fedit, fake = FedIT(training=training, finetune_epochs=3, prior=True), Fake()
    payload = fedit.broadcast(fedit.server_init(SPEC, 0), CLIENTS[0], 5)
    variants = fake.run(fedit.personalize(payload, {}, local(CLIENTS[0], 5, 5)))
    assert list(variants) == ["prior", "finetuned", "global"]
    [order] = fake.log
    assert isinstance(order, Fit)
    assert (order.epochs, order.steps, order.optimizer.lr) == (3, None, 0.2)
    assert not torch.equal(variants["finetuned"].params["up/B"], variants["global"].params["up/B"])
    fake.run(fedit.client_update(payload, {}, local(CLIENTS[0], 5, 5)))
    assert fake.log[1].optimizer.lr == pytest.approx(0.2 * 0.2)
