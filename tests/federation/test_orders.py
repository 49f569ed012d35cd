"""Orders that other systems of the field need: one Fit or Score each, to show that the vocabulary is wide enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from conformance.table import world
from fedlora.adapters.algebra import adapter, product, resize
from fedlora.federation.client import Job
from fedlora.federation.orders import Batch, Fit, Model, Optimizer, Outputs, Proximal, Score, Training, label_loss
from fedlora.federation.spec import Extras, Tree, stream
from fedlora.federation.wire import same

ADAM = Optimizer(lr=0.01)


def execute(order: Any) -> Any:
    fleet = world("fedit")
    return fleet, fleet.learner.execute(Job(order, 7, "c3"))


def begin() -> dict[str, Tensor]:
    spec = world("fedit").spec
    tree = spec.adapter(spec.ranks, 5) | {k: v for k, v in spec.start(0).items() if k.startswith("head")}
    for key, value in tree.items():
        if key.endswith("/B"):
            tree[key] = 0.1 * torch.randn(value.shape, generator=stream("begin", key), dtype=value.dtype)
    return tree


def learnt_gate(features: Tensor, params: Tree) -> Tensor:
    """FedALT: a trainable mixer between the own and the rest-of-the-world adapter."""
    return (features @ params["extra/gate"].T).softmax(-1)


def test_fedalt_trains_its_gate_beside_a_frozen_adapter() -> None:
    own, rest = begin(), adapter(begin())
    params = own | {"extra/gate": torch.zeros(2, 8, dtype=torch.float64)}
    model = Model(params, (rest,), learnt_gate)
    _, tuned = execute(Fit(model, ("A", "B", "extra", "head"), epochs=2, optimizer=ADAM))
    assert not same(tuned.params["extra/gate"], params["extra/gate"])
    assert not same(tuned.params["fc1/A"], own["fc1/A"])
    assert same(rest, adapter(begin()))


@pytest.mark.parametrize(("chosen", "frozen"), ["BA", "AB"])
def test_rolora_and_ffa_train_one_factor(chosen: str, frozen: str) -> None:
    start = begin()
    _, tuned = execute(Fit(Model(start), (chosen,), steps=3))
    assert same(tuned.params[f"fc1/{frozen}"], start[f"fc1/{frozen}"])
    assert not same(tuned.params[f"fc1/{chosen}"], start[f"fc1/{chosen}"])
    assert same(tuned.params["head/weight"], start["head/weight"])
    assert tuned.steps == 3


def test_ditto_pulls_to_another_tree() -> None:
    own = begin()
    anchor = {k: v * 0 for k, v in adapter(begin()).items() if not k.endswith("/scale")}

    def pulled(strength: float) -> float:
        order = Fit(Model(own), ("A", "B"), epochs=4, optimizer=ADAM, proximal=Proximal(strength, anchor))
        return float(execute(order)[1].params["fc1/B"].norm())

    assert pulled(10.0) < 0.5 * pulled(0.0)


def two_heads(outputs: Mapping[str, Outputs], params: Mapping[str, Tree], batch: Batch) -> Tensor:
    """FedRoD: generic head plus a personalised one on the same features."""
    out = outputs["model"]
    second = out.logits.detach() + linear(out.features.detach(), params["model"]["extra/head"])
    return label_loss(out.logits, batch.labels) + label_loss(second, batch.labels)


def test_fedrod_has_two_heads() -> None:
    start = begin() | {"extra/head": torch.zeros(4, 8, dtype=torch.float64)}
    _, tuned = execute(Fit(Model(start), ("A", "B", "head", "extra"), epochs=1, objective=two_heads))
    assert float(tuned.params["extra/head"].abs().max()) > 0
    _, plain = execute(Fit(Model(begin()), ("A", "B", "head"), epochs=1))
    assert same(plain.params["fc1/A"], tuned.params["fc1/A"], 1e-12)  # the second head sends nothing back


@dataclass(frozen=True)
class Prior:
    """The client's class shares against the mean."""

    def __call__(self, outputs: Outputs, params: Tree) -> Tensor:
        return outputs.logits + params["extra/prior"]


def test_prior_changes_the_prediction_only() -> None:
    prior = torch.tensor([50.0, 0, 0, 0], dtype=torch.float64)
    fleet, sums = execute(Score(Model(begin() | {"extra/prior": prior}, predict=Prior()), "test"))
    _, y = fleet.learner.examples("c3", "test")
    assert sums["accuracy"] == (float((y == 0).sum()), 40.0)


@pytest.mark.parametrize("optimizer", [Optimizer(lr=0.01, weight_decay=0.01), Optimizer("sgd", 0.05, 0.9, clip=0.5)])
def test_padding_of_all_factors_stays_zero(optimizer: Optimizer) -> None:
    """Lanes: a rank-2 client padded to rank 4 in A, B and C trains exactly as at rank 2."""
    small = resize(begin(), {"fc1": 2, "fc2": 2}) | {
        f"{s}/C": torch.eye(2, dtype=torch.float64) for s in ("fc1", "fc2")
    }
    large = {"fc1": 4, "fc2": 4}
    _, one = execute(Fit(Model(small), ("A", "B", "C", "head"), epochs=3, optimizer=optimizer))
    _, other = execute(Fit(Model(resize(small, large)), ("A", "B", "C", "head"), epochs=3, optimizer=optimizer))
    assert same(resize(one.params, large), other.params, 1e-12)
    assert all(torch.allclose(product(one.params, s), product(other.params, s), atol=1e-12) for s in large)
    assert not same(one.params["fc1/C"], small["fc1/C"])


def test_a_dense_change_can_be_trained() -> None:
    """SLoRA's first stage: site/W in params."""
    start = {f"{s}/W": torch.zeros(shape, dtype=torch.float64) for s, shape in world("fedit").spec.sites.items()}
    _, tuned = execute(Fit(Model(start), ("W",), epochs=1))
    assert float(tuned.params["fc1/W"].abs().max()) > 0


def test_a_pretrained_parameter_trains_from_its_own_value() -> None:
    fleet, tuned = execute(Fit(Model(begin()), ("norm",), steps=1, optimizer=Optimizer("sgd", 1e-6)))
    assert torch.allclose(tuned.params["norm/gain"], fleet.spec.pretrained["norm/gain"], atol=1e-4)
    assert not same(tuned.params["norm/gain"], fleet.spec.pretrained["norm/gain"])


def test_names_that_nothing_reads_and_selectors_that_select_nothing() -> None:
    with pytest.raises(KeyError, match="fc9"):
        execute(Score(Model({"fc9/A": torch.zeros(1)}), "test"))
    with pytest.raises(KeyError, match="'C' selects nothing"):
        execute(Fit(Model(begin()), ("A", "C"), steps=1))
    with pytest.raises(PermissionError):
        execute(Fit(Model(begin()), ("A",), steps=1, split="test"))


def test_models_with_code_do_not_travel() -> None:
    for model in (Model({}, weights=learnt_gate), Model({}, predict=Prior())):
        with pytest.raises(ValueError, match="cannot travel"):
            model.plain()
    tree = {"x/A": torch.ones(1)}
    model = Model.from_plain(Model(tree, (tree,), (0.5, 2.0), (tree,), "narrow").plain())
    assert same(model.params, tree)
    assert (model.weights, model.backbone, len(model.others), len(model.shared)) == ((0.5, 2.0), "narrow", 1, 1)


# ---------------------------------------------------------------- what the contract computes itself


def test_label_loss_is_the_mean_over_labelled_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(3, 5, 7, generator=g), torch.randint(0, 7, (3, 5), generator=g)
    labels[0, 2:] = -100
    labels[2] = -100
    losses = label_loss(scores, labels)
    by_hand = [-float(scores[0, t].log_softmax(-1)[labels[0, t]]) for t in range(2)]
    assert abs(float(losses[0]) - sum(by_hand) / 2) < 1e-5
    assert float(losses[2]) == 0
    assert torch.allclose(losses[1], cross_entropy(scores[1], labels[1]))


def test_a_schedule_scales_every_rate() -> None:
    training = Training(optimizer=Optimizer(lr=0.1, lrs=(("head", 1.0),)), schedule="cosine")
    local = type("Local", (), {"round": 6, "rounds": 10})()
    order = training.fit(local, Model({}), ("A",))
    assert abs(order.optimizer.lr - 0.05) < 1e-12
    assert abs(order.optimizer.lrs[0][1] - 0.5) < 1e-12
    steps = Training(epochs=3, steps=7)
    assert (steps.fit(local, Model({}), ("A",)).epochs, steps.fit(local, Model({}), ("A",)).steps) == (None, 7)
    assert (
        steps.fit(local, Model({}), ("A",), epochs=2).epochs,
        steps.fit(local, Model({}), ("A",), epochs=2).steps,
    ) == (2, None)
    assert [Training(schedule="linear").rate(r, 4) for r in (0, 1, 3, 5)] == [1.0, 1.0, 0.5, 0.0]


def test_starts_are_prefixes_shared_and_clamped() -> None:
    spec = world("fedit").spec
    small, large = spec.adapter({"fc1": 2, "fc2": 99}, 3), spec.adapter(spec.ranks, 3)
    assert same(small["fc1/A"], large["fc1/A"][:2])
    assert float(large["fc1/A"].abs().max()) <= 10**-0.5
    assert spec.start(1)["norm/gain"] is not spec.pretrained["norm/gain"]
    assert not same(spec.start(1)["head/weight"], spec.start(2)["head/weight"])


def test_extras_sort_a_tree() -> None:
    tree = {"head/weight": 1, "norm/x": 2, "embedding/y": 3, "q/A": 4}
    extras = Extras(head="private", norm="frozen", embedding="share")
    assert extras.trained == ("head", "embedding")
    assert extras.personal
    assert set(extras.travelling(tree)) == {"embedding/y", "q/A"}  # type: ignore[arg-type]
    assert set(extras.staying(tree)) == {"head/weight"}  # type: ignore[arg-type]
