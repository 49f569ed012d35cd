"""Every kind of order and model against a plain computation on the bare module with changed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.adapters.inject import remove
from fedlora.federation.client import Job
from fedlora.federation.orders import Batch, Features, Fit, Model, Optimizer, Outputs, Score
from fedlora.federation.spec import Extras, Tree
from fedlora.learning.learner import Learner
from fedlora.learning.loading import load_backbone
from fedlora.learning.tasks import TextClassification
from learning.worlds import (
    LABELS,
    RANKS,
    adapter,
    backbone,
    bert,
    distance,
    examples,
    learner,
    run,
    seeded,
    spec_of,
    splits,
)

SGD = Optimizer("sgd", 0.1)


def dense(tree: Tree, site: str) -> Tensor:
    """dW of one site."""
    if f"{site}/W" in tree:
        return tree[f"{site}/W"]
    inner = tree[f"{site}/C"] @ tree[f"{site}/A"] if f"{site}/C" in tree else tree[f"{site}/A"]
    return tree[f"{site}/scale"] * tree[f"{site}/B"] @ inner


def pooled(executor: Learner, changes: list[Tree], weights: list[float], unit: int, own: Tree | None = None) -> Tensor:
    """(1, width) features of one unpadded example through a bare copy of the module with changed weights."""
    base = executor.backbones["base"]
    module = base.plain()
    for site in base.sites:
        for tree, weight in zip(changes, weights):
            if f"{site}/A" in tree or f"{site}/W" in tree:
                module.get_submodule(site).weight.data += weight * dense(tree, site)
    for path, value in (own or {}).items():
        module.get_parameter(path).data = value
    store = executor.store("base")
    ids = torch.from_numpy(store.tokens[store.offsets[unit] : store.offsets[unit + 1]].astype("int64"))[None]
    with torch.no_grad():
        return module.encoder(input_ids=ids).last_hidden_state.mean(1)


def expected_score(executor: Learner, client: str, head: Tree, *features: Any, **options: Any) -> dict[str, float]:
    sums = {"loss": 0.0, "accuracy": 0.0}
    for unit in executor.units(client, "test"):
        h = pooled(executor, *features, unit=unit, **options)
        logits = functional.linear(h, head["head/weight"], head["head/bias"])
        label = torch.tensor([executor.store("base").labels[unit]])
        sums["loss"] += float(functional.cross_entropy(logits, label))
        sums["accuracy"] += float(logits.argmax() == label)
    return sums


def trees(executor: Learner, count: int, core: bool = False) -> list[dict[str, Tensor]]:
    return [adapter(executor.spec, RANKS[k % 3], seed=20 + k, core=core and k % 2 == 0) for k in range(count)]


def only_adapter(tree: Tree) -> dict[str, Tensor]:
    return {key: value for key, value in tree.items() if not key.startswith("head")}


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_weighted_sum_of_adapters(lanes):
    executor = learner(backbone(), lanes)
    a, b, c, d = trees(executor, 4, core=True)
    models = {
        "c0": (Model(a, (only_adapter(b),), (0.7, -0.4)), [a, b], [0.7, -0.4]),
        "c1": (Model(c, (only_adapter(d),), (1.2, 0.3)), [c, d], [1.2, 0.3]),
        "c2": (Model(b, (only_adapter(c),)), [b, c], [1.0, 1.0]),
    }
    found = run(executor, {client: Score(model, "test") for client, (model, _, _) in models.items()})
    for client, (model, changes, weights) in models.items():
        for name, value in expected_score(executor, client, model.params, changes, weights).items():
            assert found[client][name] == (pytest.approx(value, abs=1e-9), 7)


@dataclass(frozen=True)
class Nearness:
    """A gate that depends on the example and on an array of its own."""

    sharpness: float

    def __call__(self, features: Tensor, params: Tree) -> Tensor:
        near = torch.sigmoid(self.sharpness * features @ params["extra/direction"])
        return torch.stack([near, 1 - near], -1)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_gate_weighs_adapters_per_example(lanes):
    executor = learner(backbone(), lanes)
    a, b, c = trees(executor, 3)
    direction = torch.linspace(-1, 1, 24, dtype=torch.float64)
    models = {
        client: Model({**first, "extra/direction": factor * direction}, (only_adapter(second),), Nearness(2.0))
        for client, first, second, factor in (("c0", a, b, 1.0), ("c1", c, a, -3.0))
    }
    found = run(executor, {client: Score(model, "test") for client, model in models.items()})
    features = run(executor, {client: Features(model, "test") for client, model in models.items()})
    for client, model in models.items():
        total = 0.0
        for i, unit in enumerate(executor.units(client, "test")):
            plain = pooled(executor, [], [], unit)
            near = float(torch.sigmoid(2.0 * plain @ model.params["extra/direction"]))
            h = pooled(executor, [model.params, model.others[0]], [near, 1 - near], unit)
            torch.testing.assert_close(features[client][0][i], h[0])
            logits = functional.linear(h, model.params["head/weight"], model.params["head/bias"])
            total += float(functional.cross_entropy(logits, torch.tensor([executor.store("base").labels[unit]])))
        assert found[client]["loss"] == (pytest.approx(total, abs=1e-9), 7)


def test_a_gate_can_be_trained():
    executor = learner(backbone(), 2)
    a, b = trees(executor, 2)
    start = 0.1 * torch.ones(24, dtype=torch.float64)
    model = Model({**a, "extra/direction": start}, (only_adapter(b),), Nearness(1.0))
    tuned = run(executor, {"c0": Fit(model, ("extra",), epochs=1, optimizer=SGD)})["c0"]
    assert not torch.equal(tuned.params["extra/direction"], start)
    assert (
        distance(only_adapter(tuned.params) | {"extra/direction": start}, {**only_adapter(a), "extra/direction": start})
        == 0
    )


@pytest.mark.parametrize("lanes", [1, 3])
def test_shared_changes_are_merged_once(lanes):
    executor = learner(backbone(), lanes)
    a, b, c = trees(executor, 3)
    site = next(iter(executor.spec.sites))
    low = only_adapter(b)
    whole = {f"{site}/W": 0.1 * torch.randn(executor.spec.sites[site], dtype=torch.float64)}
    shared = (low, whole)
    before = executor.backbones["base"].fingerprint
    models = {"c0": Model(a, shared=shared), "c1": Model(c, shared=shared), "c2": Model(b, shared=shared)}
    found = run(executor, {client: Score(model, "test") for client, model in models.items()})
    for client, model in models.items():
        wanted = expected_score(executor, client, model.params, [model.params, low, whole], [1.0, 1.0, 1.0])
        assert found[client]["loss"] == (pytest.approx(wanted["loss"], abs=1e-9), 7)
    tuned = run(executor, {client: Fit(model, ("A", "B"), epochs=1) for client, model in models.items()})
    assert tuned["c0"].steps > 0
    assert executor.merges.count == 1
    del executor.backbones["base"].fingerprint
    assert executor.backbones["base"].fingerprint == before


def test_a_dense_change_is_trained_like_the_weight_itself():
    executor = learner(backbone(), 3)
    (a,) = trees(executor, 1)
    site = next(iter(executor.spec.sites))
    start = {**a, f"{site}/W": torch.zeros(executor.spec.sites[site], dtype=torch.float64)}
    order = Fit(Model(start), ("W",), steps=1, batch_size=99, optimizer=SGD)
    both = run(executor, {"c0": order, "c1": order})
    module = executor.backbones["base"].plain()
    for name in executor.spec.sites:
        module.get_submodule(name).weight.data += dense(a, name)
    for key in ("weight", "bias"):
        getattr(module.head, key).data = a[f"head/{key}"]
    weight = module.get_submodule(site).weight.requires_grad_()
    units = executor.units("c0", "train")
    inputs, labels = executor.task.collate(executor.store("base"), units)
    (gradient,) = torch.autograd.grad(module(**inputs, labels=labels).loss, weight)
    torch.testing.assert_close(both["c0"].params[f"{site}/W"], -0.1 * gradient)
    assert not torch.equal(both["c1"].params[f"{site}/W"], both["c0"].params[f"{site}/W"])


def test_norms_and_embeddings_train_and_start_from_the_base():
    base = backbone()
    spec = spec_of(base, extras=Extras(norm="share", embedding="share"))
    executor = learner(base, 3, spec=spec)
    a = {
        key: value for key, value in adapter(spec, 3, seed=1).items() if key.split("/")[0] not in ("norm", "embedding")
    }
    order = Fit(Model(a), ("norm", "embedding", "head"), steps=1, batch_size=99, optimizer=SGD)
    tuned = run(executor, {"c1": order, "c2": order})
    module = base.plain()
    for name in spec.sites:
        module.get_submodule(name).weight.data += dense(a, name)
    for key in ("weight", "bias"):
        getattr(module.head, key).data = a[f"head/{key}"]
    module.requires_grad_()
    inputs, labels = executor.task.collate(executor.store("base"), executor.units("c1", "train"))
    module(**inputs, labels=labels).loss.backward()
    keys = [key for key in tuned["c1"].params if key.startswith(("norm/", "embedding/"))]
    assert len(keys) == 2 * 5 + 3
    for key in keys:
        parameter = module.get_parameter(key.partition("/")[2])
        torch.testing.assert_close(tuned["c1"].params[key], parameter.detach() - 0.1 * parameter.grad)
    own = {key.partition("/")[2]: tuned["c1"].params[key] for key in keys}
    wanted = expected_score(executor, "c1", tuned["c1"].params, [a], [1.0], own=own)
    found = run(executor, {"c1": Score(Model(tuned["c1"].params), "test")})["c1"]
    assert found["loss"] == (pytest.approx(wanted["loss"], abs=1e-9), 7)


def test_features_are_in_the_order_of_the_split():
    executor = learner(backbone(), 3)
    a, b = trees(executor, 2)
    found = run(
        executor, {"c0": Features(Model(a), "train"), "c4": Features(Model(b), "train"), "c5": Features(Model({}))}
    )
    for client, changes in (("c0", [a]), ("c4", [b]), ("c5", [])):
        features, labels = found[client]
        units = executor.units(client, "train")
        assert labels.tolist() == executor.store("base").labels[units].tolist()
        for i in (0, len(units) - 1):
            torch.testing.assert_close(features[i : i + 1], pooled(executor, changes, [1.0] * len(changes), units[i]))


# -- objectives, several models, private models


@dataclass(frozen=True)
class Mutual:
    """Cross-entropy of both models, and the shared one's nearness to the private one."""

    blend: float

    def __call__(self, outputs: Mapping[str, Outputs], params: Mapping[str, Tree], batch: Batch) -> Tensor:
        mine, shared = outputs["private"].logits, outputs["shared"].logits
        near = (mine.detach() - shared).square().mean(-1) * params["private"]["extra/strength"]
        truth = [functional.cross_entropy(y, batch.labels, reduction="none") for y in (mine, shared)]
        return truth[0] + self.blend * truth[1] + near


class Mean(nn.Module):
    """A private text model of one's own: the mean of embeddings, a hidden layer, a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 12)
        self.hidden = nn.Linear(12, width)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weight = mask[..., None].to(self.embedding.weight.dtype)
        pooled = (self.embedding(ids) * weight).sum(1) / weight.sum(1)
        return self.head(torch.tanh(self.hidden(pooled)))


def private(width: int) -> Any:
    module = seeded(lambda: Mean(width))
    return load_backbone(module, "text-classification", labels=LABELS, dtype=torch.float64, adapt=False)


def with_private(lanes: int) -> Learner:
    base, own = backbone(), private(24)
    parts, count = splits(6)
    backbones = {"base": base, "own": own}
    store = examples(count)
    return Learner(backbones, TextClassification(LABELS), store, parts, spec_of(base), 3, lanes, 200)


@pytest.mark.parametrize("lanes", [1, 4])
def test_two_models_train_on_one_batch(lanes):
    executor = with_private(lanes)
    strength = torch.tensor(0.3, dtype=torch.float64)
    results = {}
    for k, client in enumerate(("c0", "c1")):
        shared = adapter(executor.spec, RANKS[k], seed=k)
        models = {"private": Model({"extra/strength": strength}, backbone="own"), "shared": Model(shared)}
        trains = {"private": ("backbone", "head"), "shared": ("A", "B", "head")}
        order = Fit(models, trains, steps=1, batch_size=99, optimizer=SGD, objective=Mutual(0.5))
        results[client] = (order, run(executor, {client: order})[client])
    for order, tuned in results.values():
        params = tuned.models["private"]
        assert {key.split("/")[0] for key in params} == {"backbone", "head", "extra"}
        assert float(params["extra/strength"]) == 0.3
        assert set(tuned.models["shared"]) == set(order.models["shared"].params)
    check_mutual_step(executor, *results["c0"])


def check_mutual_step(executor: Learner, order: Fit, tuned: Any) -> None:
    """One step of SGD, by autograd on bare modules."""
    own = executor.backbones["own"].plain().requires_grad_()
    head = executor.spec.start(executor.run_seed)
    shared = order.models["shared"].params
    base = executor.backbones["base"].plain()
    leaves = {key: shared[key].clone().requires_grad_() for key in shared if key.endswith(("/A", "/B"))}
    changed = {
        f"{s}.weight": base.get_submodule(s).weight + dense({**shared, **leaves}, s) for s in executor.spec.sites
    }
    for key in ("weight", "bias"):
        getattr(own.head, key).data = head[f"head/{key}"].clone()
        getattr(base.head, key).data = shared[f"head/{key}"].clone()
    inputs, labels = executor.task.collate(executor.store("base"), executor.units("c0", "train"))
    mine = own(inputs["input_ids"], inputs["attention_mask"])
    theirs = torch.func.functional_call(base, changed, (), dict(inputs)).logits
    outputs = {"private": Outputs(mine, mine), "shared": Outputs(theirs, theirs)}
    loss = Mutual(0.5)(outputs, {"private": {"extra/strength": torch.tensor(0.3)}}, Batch(inputs, labels)).mean()
    loss.backward()
    for name, parameter in own.named_parameters():
        key = f"head/{name[5:]}" if name.startswith("head.") else f"backbone/{name}"
        wanted = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(tuned.models["private"][key], wanted)
    for key, leaf in leaves.items():
        torch.testing.assert_close(tuned.models["shared"][key], shared[key] - 0.1 * leaf.grad)


@dataclass(frozen=True)
class Doubled:
    """A prediction that reads an array of its own."""

    factor: float

    def __call__(self, outputs: Outputs, params: Tree) -> Tensor:
        return self.factor * outputs.logits + outputs.features @ params["extra/map"].T


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_prediction_of_ones_own(lanes):
    executor = learner(backbone(), lanes)
    a, b = trees(executor, 2)
    maps = [torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    models = {f"c{k}": Model({**t, "extra/map": m}, predict=Doubled(2.0)) for k, (t, m) in enumerate(zip((a, b), maps))}
    found = run(executor, {client: Score(model, "test") for client, model in models.items()})
    for client, model in models.items():
        total = 0.0
        for unit in executor.units(client, "test"):
            h = pooled(executor, [model.params], [1.0], unit)
            logits = functional.linear(h, model.params["head/weight"], model.params["head/bias"])
            scores = 2 * logits + h @ model.params["extra/map"].T
            total += float(functional.cross_entropy(scores, torch.tensor([executor.store("base").labels[unit]])))
        assert found[client]["loss"] == (pytest.approx(total, abs=1e-9), 7)


# -- refusals


def refused(executor: Learner, order: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        executor.submit(Job(order, 0, "c0"))
    assert executor.idle


def test_names_that_nobody_reads_are_errors():
    executor = with_private(2)
    tree = adapter(executor.spec, 2, seed=0)
    site = next(iter(executor.spec.sites))
    refused(executor, Score(Model({**tree, "encoder.wrong/A": tree[f"{site}/A"]}), "test"), KeyError, "encoder.wrong/A")
    refused(executor, Score(Model({**tree, "tail/weight": tree["head/weight"]}), "test"), KeyError, "tail/weight")
    refused(
        executor, Score(Model({**tree, "norm/nowhere.weight": tree["head/bias"]}), "test"), KeyError, "norm/nowhere"
    )
    refused(executor, Score(Model(tree, (tree,)), "test"), KeyError, "head/")
    refused(executor, Score(Model(tree, backbone="own"), "test"), KeyError, "'own' reads")
    refused(executor, Score(Model(tree, backbone="other"), "test"), KeyError, "no backbone 'other'")
    half = {key: value for key, value in tree.items() if key != f"{site}/scale"}
    refused(executor, Score(Model(half), "test"), KeyError, "without .*/scale")


def test_orders_that_cannot_be_meant():
    executor = with_private(2)
    tree = adapter(executor.spec, 2, seed=0)
    refused(executor, Fit(Model(tree), ("C",), epochs=1), KeyError, "'C' selects nothing")
    refused(executor, Fit(Model(tree), ("A",), epochs=1, split="test"), PermissionError, "test split")
    refused(executor, Fit({"a": Model(tree)}, {"b": ("A",)}, epochs=1), KeyError, "train names")


def test_removing_the_adapted_layers_gives_the_module_back():
    base = backbone()
    plain = base.plain()
    remove(base.module)
    assert {name.replace("head.", "") for name, _ in plain.named_parameters()} >= set(
        dict(base.module.named_parameters())
    )
    assert distance(dict(bert().double().state_dict()), dict(base.module.encoder.state_dict())) == 0
