"""CE-LoRA: distances by closed form and linear programming, similarities by Gram matrices, mixtures by numpy."""

from __future__ import annotations

import importlib
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from fedlora.algorithms.ce_lora import CELoRA
from fedlora.algorithms.similarity import (
    blurred,
    cka,
    cosine,
    data_similarity,
    distance,
    malformed,
    model_similarity,
    statistics,
)
from fedlora.errors import UserError
from fedlora.federation.orders import Fit
from fedlora.federation.spec import Extras, ModelSpec
from reference.fake import SITES, SPEC, Fake, array, client, close, local, train

CLIENTS = [client("a", examples=10), client("b", examples=30), client("c", examples=60)]
IDENTITY = {"q/C": torch.eye(2)}
pytest.importorskip("ot")


def examples(seed: int, counts: tuple[int, ...] = (5, 6, 0)) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), counts)
    return torch.tensor(rng.normal(size=(len(labels), 6)) + labels[:, None]), torch.tensor(labels)


def transported(a: Any, b: Any, cost: Any) -> float:
    """Optimal transport as a linear programme."""
    m, n = cost.shape
    rows = [np.kron(np.eye(m)[i], np.ones(n)) for i in range(m)] + [np.kron(np.ones(m), np.eye(n)[j]) for j in range(n)]
    found = linprog(cost.ravel(), A_eq=np.array(rows), b_eq=np.concatenate([a, b]), bounds=(0, None))
    return float(found.fun)


def gaussians(seed: int, components: tuple[int, ...], classes: tuple[int, ...], counts: tuple[int, ...]) -> Any:
    rng, k = np.random.default_rng(seed), sum(components)
    shares = np.concatenate([rng.dirichlet(np.ones(c)) for c in components])
    return {
        "shares": torch.tensor(shares),
        "means": torch.tensor(rng.normal(size=(k, 2))),
        "variances": torch.tensor(rng.uniform(0.1, 2, size=(k, 2))),
        "class": torch.tensor(np.repeat(classes, components)),
        "counts": torch.tensor(np.repeat(counts, components)),
    }


def test_distance_is_a_transport_of_transports() -> None:
    a, b = gaussians(1, (2, 1), (0, 4), (12, 4)), gaussians(2, (3, 1, 2), (1, 2, 4), (5, 3, 8))
    x, y = ({key: array(value) for key, value in tree.items()} for tree in (a, b))
    between = np.zeros((2, 3))
    for (i, p), (j, q) in product(enumerate((0, 4)), enumerate((1, 2, 4))):
        rows, columns = np.flatnonzero(x["class"] == p), np.flatnonzero(y["class"] == q)
        cost = np.array(
            [
                [
                    sum((x["means"][r] - y["means"][c]) ** 2)
                    + sum((math.sqrt(v) - math.sqrt(w)) ** 2 for v, w in zip(x["variances"][r], y["variances"][c]))
                    for c in columns
                ]
                for r in rows
            ]
        )
        between[i, j] = transported(x["shares"][rows], y["shares"][columns], cost)
    by_hand = math.sqrt(transported(np.array([12, 4]) / 16, np.array([5, 3, 8]) / 16, between))
    assert distance(a, b) == pytest.approx(by_hand, abs=1e-8)
    assert distance(a, b) == pytest.approx(distance(b, a), abs=1e-10)
    assert distance(a, a) == pytest.approx(0, abs=1e-7)


def test_no_solver_runs_where_there_is_one_plan_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of few examples: one component a class. A population of 1,000 has half a million pairs of them."""
    a, b = gaussians(1, (1, 1), (0, 4), (12, 4)), gaussians(2, (3, 1, 1), (1, 2, 4), (5, 3, 8))
    ot, sizes = importlib.import_module("ot"), list[tuple[int, ...]]()

    def solved(p: Any, q: Any, cost: Any, emd2: Any = ot.emd2, **how: Any) -> Any:
        sizes.append(cost.shape)
        return emd2(p, q, cost, **how)

    monkeypatch.setattr(ot, "emd2", solved)
    distance(a, b)
    assert sizes == [(2, 3)]


def test_statistics_of_single_gaussians() -> None:
    """Fewer than 20 examples a class: one component, whose mean and variance are the class's own."""
    features, labels = examples(0, (5, 6, 1))
    found = statistics(features, labels, project=32, seed=0)
    assert found["class"].tolist() == [0, 1]  # the third class has one example
    assert found["counts"].tolist() == [5, 6]
    for k, c in enumerate((0, 1)):
        rows = array(features)[array(labels) == c]
        np.testing.assert_allclose(array(found["means"][k]), rows.mean(0), atol=1e-8)
        np.testing.assert_allclose(array(found["variances"][k]), rows.var(0) + 1e-4, atol=1e-8)
    many = statistics(*examples(0, (25, 35, 4)), project=2, seed=0)
    assert many["class"].tolist() == [0, 0, 1, 1, 1, 2]
    assert many["means"].shape == (6, 2)
    assert float(many["shares"][:2].sum()) == pytest.approx(1)


def test_statistics_that_are_none_are_refused_before_anything_is_computed_with_them() -> None:
    good = statistics(*examples(0, (25, 35, 4)), project=2, seed=0)
    assert malformed(good, 2, 3) is None
    assert malformed(statistics(*examples(1, (1, 0, 1)), project=2, seed=0), 2, 3) is None  # one Gaussian for all
    n = len(good["class"])
    bad: dict[str, dict[str, Any]] = {
        "means has shape": {"means": good["means"][:, :1]},
        "shares has shape": {"shares": good["shares"][: n - 1]},
        "class has type": {"class": good["class"].double()},
        "means has type": {"means": good["means"].float()},
        "counts is not positive": {"counts": torch.zeros_like(good["counts"])},
        "variances is not positive": {"variances": good["variances"] * 0},
        "do not sum to 1": {"shares": good["shares"] * 2},
        "disagree on the count": {"counts": torch.arange(1, n + 1)},
        "at least one component": {name: value[:0] for name, value in good.items()},
        "classes have at most": {name: torch.cat([value] * 9) for name, value in good.items()},
    }
    for reason, change in bad.items():
        assert reason in (malformed({**good, **change}, 2, 3) or ""), reason


def test_statistics_without_a_usable_class_or_without_classes() -> None:
    features, _ = examples(0)
    alone = statistics(features[:3], torch.tensor([0, 1, 2]), project=32, seed=0)
    assert alone["class"].tolist() == [-1]
    np.testing.assert_allclose(array(alone["means"][0]), array(features[:3]).mean(0), atol=1e-8)
    assert statistics(features[:1], torch.tensor([2]), project=32, seed=0)["shares"].tolist() == [1.0]
    tokens = statistics(features, torch.zeros(len(features), 7, dtype=torch.int64), project=32, seed=0)
    assert tokens["class"].tolist() == [0]


def test_cka_by_centred_gram_matrices() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(5, 5)), 1e-5 * rng.normal(size=(5, 5))
    centre = np.eye(5) - 1 / 5
    g, h = (centre @ m @ m.T @ centre for m in (x, y))
    by_hand = (g * h).sum() / math.sqrt((g * g).sum() * (h * h).sum())
    still, flat = np.full((5, 5), 1e-10), np.ones((5, 5))  # one has hardly moved, one is nothing once it is centred
    stack = torch.tensor(np.stack([x, y, -x, still, flat]))
    for one, expected in ((cka(stack), [1, by_hand, 1, 0, 0]), (cosine(stack), [1, None, -1, 0, None])):
        assert torch.equal(one, one.T)
        for found, value in zip(one[0].tolist(), expected):
            assert value is None or found == pytest.approx(value, abs=1e-12)
    angle = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    assert float(cosine(stack)[0, 1]) == pytest.approx(angle, abs=1e-12)


def test_similarities_are_scaled_over_pairs() -> None:
    near = data_similarity(["a", "b", "c"], {"a": {"b": 1.0, "c": 2.0}, "b": {"c": 4.0}})
    assert near["a", "a"] == 1
    assert near["c", "a"] == near["a", "c"] == pytest.approx(math.exp(-1))
    assert near["c", "b"] == pytest.approx(math.exp(-2))
    cores = {
        n: {"q/C": torch.eye(2) + t}
        for n, t in (("a", torch.ones(2, 2)), ("b", torch.eye(2)), ("c", -torch.ones(2, 2)))
    }
    agree = model_similarity(cores, IDENTITY, cosine)  # raw: ab 1/sqrt 2, ac -1, bc -1/sqrt 2
    assert agree["a", "b"] == 1
    assert agree["a", "c"] == 0
    assert agree["b", "c"] == pytest.approx((1 - math.sqrt(0.5)) / (1 + math.sqrt(0.5)))
    assert model_similarity({"a": cores["a"], "b": cores["b"]}, IDENTITY, cosine)["a", "b"] == 0.5  # a constant
    assert model_similarity({"a": cores["a"]}, IDENTITY, cosine) == {("a", "a"): 1.0}


def test_rounding_is_no_similarity() -> None:
    """Copies of one client's data in another order, cores that are equal but for the last digits."""
    copies = data_similarity(["a", "b", "c"], {"a": {"b": 1.5e-16, "c": 2.0}, "b": {"c": 2.0}})
    assert copies["a", "b"] == pytest.approx(1)
    assert copies["a", "c"] == pytest.approx(math.exp(-1))
    draw = np.random.default_rng(4)
    same = draw.normal(size=(4, 4))
    cores = {name: {"q/C": torch.eye(4) + torch.tensor(same + 1e-13 * draw.normal(size=(4, 4)))} for name in "abcd"}
    for measure in (cka, cosine):
        agree = model_similarity(cores, {"q/C": torch.eye(4)}, measure)
        assert {value for (i, j), value in agree.items() if i != j} == {0.5}


def test_cka_sees_rows_that_are_nearly_equal() -> None:
    draw = np.random.default_rng(5)
    x, y = (1 + 1e-5 * draw.normal(size=(4, 4)) for _ in range(2))
    centre = np.eye(4) - 1 / 4
    g, h = (centre @ m @ m.T @ centre for m in (x, y))
    by_hand = (g * h).sum() / math.sqrt((g * g).sum() * (h * h).sum())
    assert float(cka(torch.tensor(np.stack([x, y])))[0, 1]) == pytest.approx(by_hand, abs=1e-6)


def introduced(ce: CELoRA, who: list[Any] = CLIENTS) -> tuple[Any, dict[str, Any]]:
    state, total, memories = ce.server_init(SPEC, 0), ce.introduction.zero(), {}
    for seed, one in enumerate(who):
        fake = Fake(seed=seed, features=examples(seed))
        update, memories[one.id] = fake.run(ce.client_init(local(one, 0)))
        assert set(update.arrays) == set(ce.expects(state, one, 0, "introduce"))
        total = ce.introduction.accumulate(total, one, update)
    return ce.server_introduce(state, ce.introduction.report(total), 0), memories


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_each_client_gets_its_own_mixture_of_cores(blend: float) -> None:
    ce = CELoRA(blend=blend, similarity="cosine")
    state, memories = introduced(ce)
    payload = ce.broadcast(state, CLIENTS[0], 1)
    assert set(payload) == {"down/C", "up/C"}  # the head stays home by default
    close(payload["down/C"], np.eye(4), 0)
    after, updates = train(ce, state, CLIENTS, memories=memories)
    assert all(set(update.arrays) == {"down/C", "up/C"} for update in updates.values())
    near = data_similarity(["a", "b", "c"], after["distances"])
    agree = model_similarity({n: u.arrays for n, u in updates.items()}, ce.broadcast(state, CLIENTS[0], 1), cosine)
    for i in "abc":
        row = np.array([blend * near[i, j] + (1 - blend) * agree[i, j] for j in "abc"])
        row /= row.sum()
        served = ce.broadcast(after, client(i), 2)
        for site in SITES:
            close(served[f"{site}/C"], sum(w * array(updates[j].arrays[f"{site}/C"]) for w, j in zip(row, "abc")))
    assert ce.server_model(after) is None


def test_a_newcomer_is_mixed_by_data_alone_and_old_cores_stay() -> None:
    ce = CELoRA()
    state, memories = introduced(ce, [*CLIENTS, client("d")])
    one, sent = train(ce, state, CLIENTS, memories=memories)
    near = data_similarity(list("abcd"), one["distances"])
    row = np.array([near["d", j] for j in "abc"])
    close(np.array([one["weights"]["d"][j] for j in "abc"]), row / row.sum())
    two, again = train(ce, one, CLIENTS[1:], round=2, memories=memories)
    assert torch.equal(two["cores"]["a"]["up/C"], sent["a"].arrays["up/C"])
    assert torch.equal(two["cores"]["b"]["up/C"], again["b"].arrays["up/C"])
    stranger = ce.broadcast(two, client("z"), 3)
    close(stranger["up/C"], np.eye(3), 0)


def test_tri_factor_start_decay_and_home() -> None:
    ce = CELoRA()
    start = ce.begun(SPEC, 0)
    for site in SITES:
        close(start[f"{site}/C"], np.eye(SPEC.ranks[site]), 0)
        assert float(start[f"{site}/B"].abs().max()) == 0
        assert float(start[f"{site}/A"].abs().max()) < 5e-3
    state, memories = introduced(ce)
    assert torch.equal(memories["a"]["own"]["up/A"], memories["b"]["own"]["up/A"])
    fake = Fake()
    _, memory = fake.run(ce.client_update(ce.broadcast(state, CLIENTS[0], 1), memories["a"], local(CLIENTS[0])))
    [order] = fake.log
    assert isinstance(order, Fit)
    assert order.train == ("A", "B", "C", "head")
    assert "C" in order.optimizer.no_decay
    models = fake.run(ce.personalize({"up/C": torch.zeros(3, 3)}, memory, local(CLIENTS[0])))
    assert list(models) == ["mixed", "own"]
    assert float(models["mixed"].params["up/C"].abs().max()) == 0
    assert torch.equal(models["mixed"].params["up/B"], models["own"].params["up/B"])
    assert not torch.equal(models["own"].params["up/C"], start["up/C"])


def test_a_shared_head_is_the_weighted_mean_of_the_round() -> None:
    ce = CELoRA(extras=Extras(head="share"))
    state, memories = introduced(ce)
    after, updates = train(ce, state, CLIENTS, memories=memories)
    shares = {"a": 0.1, "b": 0.3, "c": 0.6}
    by_hand = array(state["whole"]["head/weight"]) + sum(
        p * array(updates[n].arrays["head/weight"]) for n, p in shares.items()
    )
    close(after["whole"]["head/weight"], by_hand)
    close(ce.broadcast(after, CLIENTS[0], 2)["head/weight"], by_hand)


def test_mixed_ranks_are_refused_and_small_ones_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    ce = CELoRA()
    with pytest.raises(ValueError, match="ranks must be equal"):
        Fake(features=examples(0)).run(ce.client_init(local(client("d", 2), 0)))
    ce.server_init(SPEC, 0)  # a site of rank 3
    assert "CKA" in caplog.text


def test_frozen_bases_are_shared_orthonormal_and_only_cores_learn() -> None:
    ce = CELoRA(bases="frozen", core_lr=0.5)
    state, memories = introduced(ce)
    start = memories["a"]["own"]
    for site in SITES:
        a, b = array(start[f"{site}/A"]), array(start[f"{site}/B"])
        np.testing.assert_allclose(a @ a.T, np.eye(len(a)), atol=1e-6)
        np.testing.assert_allclose(b.T @ b, np.eye(len(a)), atol=1e-6)
        assert not array(start[f"{site}/C"]).any()
    assert not np.allclose(array(start["up/A"])[:2, :2], array(start["down/A"])[:2, :2])
    fake = Fake()
    _, memory = fake.run(ce.client_update(ce.broadcast(state, CLIENTS[0], 1), memories["a"], local(CLIENTS[0])))
    [order] = fake.log
    assert order.train == ("C", "head")
    assert dict(order.optimizer.lrs)["C"] == 0.5
    for site in SITES:
        assert torch.equal(memory["own"][f"{site}/A"], start[f"{site}/A"])
    # one basis: the mixture of the cores is the mixture of the products
    after, updates = train(ce, state, CLIENTS, memories=memories)
    row, served = after["weights"]["a"], ce.broadcast(after, CLIENTS[0], 2)
    b, a = array(start["up/B"]), array(start["up/A"])
    products = sum(row[n] * (b @ array(u.arrays["up/C"]) @ a) for n, u in updates.items())
    np.testing.assert_allclose(b @ array(served["up/C"]) @ a, products, atol=1e-6)


@pytest.mark.parametrize(("mixing", "row"), [("uniform", [1 / 3, 1 / 3, 1 / 3]), ("own", [0.0, 1.0, 0.0])])
def test_mixtures_to_ablate(mixing: Any, row: list[float]) -> None:
    ce = CELoRA(mixing=mixing)
    state, memories = introduced(ce, [*CLIENTS, client("d")])
    after, updates = train(ce, state, CLIENTS, memories=memories)
    served = ce.broadcast(after, CLIENTS[1], 2)
    close(served["up/C"], sum(w * array(updates[n].arrays["up/C"]) for w, n in zip(row, "abc")))
    # a newcomer has no core of its own to keep
    assert sum(after["weights"]["d"].values()) == pytest.approx(1)


def test_kaiming_start_and_statistics_as_they_are() -> None:
    small, kaiming = CELoRA().begun(SPEC, 0), CELoRA(start_std=None).begun(SPEC, 0)
    assert torch.equal(kaiming["up/A"], SPEC.adapter(SPEC.ranks, 0)["up/A"])
    assert float(small["up/A"].abs().max()) < 0.1 * float(kaiming["up/A"].abs().max())
    rng = np.random.default_rng(1)
    wide = torch.tensor(rng.normal(size=(12, 40)))
    assert statistics(wide, torch.zeros(12, dtype=torch.int64), None, 0)["means"].shape == (1, 40)
    assert statistics(wide, torch.zeros(12, dtype=torch.int64), 32, 0)["means"].shape == (1, 32)


def test_noise_is_in_units_of_the_features_deviation() -> None:
    rng = np.random.default_rng(2)
    x = torch.tensor(rng.normal(size=(4000, 3)) * 7 + 2)
    labels = torch.tensor(np.repeat(np.arange(200), 20))
    found = statistics(x, labels, None, 0)
    moved = blurred(found, 0.5, seed=3)
    change = array(moved["means"] - found["means"])
    assert change.std() == pytest.approx(0.5 * array(x).std(), rel=0.1)
    assert (array(moved["variances"]) >= 0).all()
    scaled = {**found, "means": found["means"] * 10, "variances": found["variances"] * 100}
    np.testing.assert_allclose(array(blurred(scaled, 0.5, 3)["means"] - scaled["means"]), 10 * change, rtol=1e-9)
    assert torch.equal(moved["shares"], found["shares"])


def test_a_newcomer_far_from_everybody_is_served_every_core_alike() -> None:
    """exp(-D / tau) is 0 in float64 from D = 745 tau on; one such client must not end the federation."""
    ce, total = CELoRA(project=None), CELoRA().introduction.zero()
    who = [*CLIENTS, client("d"), client("far")]
    memories: dict[str, Any] = {}
    for seed, one in enumerate(who):
        features, labels = examples(seed)
        fake = Fake(seed=seed, features=(features + (1e5 if one.id == "far" else 0), labels))
        update, memories[one.id] = fake.run(ce.client_init(local(one, 0)))
        total = ce.introduction.accumulate(total, one, update)
    state = ce.server_introduce(ce.server_init(SPEC, 0), ce.introduction.report(total), 0)
    after, updates = train(ce, state, CLIENTS, memories=memories)
    assert after["weights"]["far"] == pytest.approx(dict.fromkeys("abc", 1 / 3))
    served = ce.broadcast(after, who[-1], 2)
    close(served["up/C"], sum(array(u.arrays["up/C"]) for u in updates.values()) / 3)


def test_features_that_are_not_finite_name_their_client() -> None:
    features, labels = examples(0)
    features[2, 1] = math.nan
    with pytest.raises(UserError, match="1 of 11 examples of client 'b' is not finite"):
        Fake(features=(features, labels)).run(CELoRA().client_init(local(CLIENTS[1], 0)))


def test_a_model_without_adapted_layers_is_refused() -> None:
    with pytest.raises(UserError, match="no layer is adapted"):
        CELoRA().server_init(ModelSpec({}, {}, {"head/bias": (2,)}, ("no", "yes"), width=3), 0)
