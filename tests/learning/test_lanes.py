"""Lanes: many clients in one pass give what each would alone, and what PEFT with torch.optim gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch.nn import functional

from fedlora.federation.client import Job
from fedlora.federation.orders import Features, Fit, Model, Optimizer, Proximal, Score
from fedlora.learning.fitting import Diverged, Fits
from fedlora.learning.optim import plan
from fedlora.learning.tasks import CausalLM
from learning.worlds import (
    LABELS,
    RANKS,
    adapter,
    backbone,
    bert,
    distance,
    examples,
    gpt2,
    learner,
    llama,
    run,
    splits,
)

CLIENTS = [f"c{k}" for k in range(10)]
ADAMW = Optimizer("adamw", 3e-3, weight_decay=0.01, clip=0.5, lrs=(("head", 1e-2),), no_decay=("head", "C"))
SGD = Optimizer("sgd", 0.05, momentum=0.9, weight_decay=0.01, clip=0.5)


def world(kind: str, lanes: int, dtype: torch.dtype = torch.float64, **options: Any):
    base = backbone(kind, dtype)
    if kind != "bert":
        options |= {"task": CausalLM(), "examples": examples(splits(len(CLIENTS))[1], causal=True)}
    return learner(base, lanes, len(CLIENTS), **options)


def orders(spec, optimizer: Optimizer, core: bool = False, epochs: int = 5) -> dict[str, Fit]:
    """Three ranks, uneven counts (14 to 50 examples), one order a client."""
    train = ("A", "B", *(("C",) if core else ()), *(("head",) if spec.labels else ()))
    trees = [adapter(spec, RANKS[k % 3], seed=k, core=core) for k in range(len(CLIENTS))]
    return {c: Fit(Model(t), train, epochs, batch_size=4, optimizer=optimizer) for c, t in zip(CLIENTS, trees)}


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize(("lanes", "dropout"), [(1, 0.0), (4, 0.3)])
def test_batches_of_few_shapes_change_nothing_else(
    kind: str, lanes: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bfloat16 does to its batches, tried in float64: longer rows, more rows, the same numbers
    (by SGD: AdamW divides gradients of rounding alone by their own size)."""
    found = []
    for coarse in (False, True):
        monkeypatch.setattr("fedlora.learning.learner.COMPILED", (torch.float64,) if coarse else ())
        executor = world(kind, lanes, dropout=dropout)
        fitted = run(executor, orders(executor.spec, Optimizer("sgd", 0.05), epochs=2))
        models = {c: Model(fitted[c].params) for c in CLIENTS}
        scored = run(executor, {c: Score(m, "test") for c, m in models.items()})
        features = run(executor, {c: Features(m, "holdout") for c, m in models.items()})
        found.append((fitted, scored, features))
    plain, coarse = found
    for c in CLIENTS:
        assert distance(plain[0][c].params, coarse[0][c].params) < 1e-10
        assert plain[1][c].keys() == coarse[1][c].keys()
        for name, pair in plain[1][c].items():
            assert coarse[1][c][name] == pytest.approx(pair, abs=1e-9)
        assert float((plain[2][c][0] - coarse[2][c][0]).abs().max()) < 1e-10


@pytest.mark.parametrize(
    ("kind", "optimizer", "core"),
    [
        ("bert", ADAMW, False),
        ("bert", SGD, True),
        ("llama", ADAMW, True),
        pytest.param("llama", SGD, False, marks=pytest.mark.slow),
        ("gpt2", SGD, True),
        pytest.param("gpt2", ADAMW, False, marks=pytest.mark.slow),
    ],
)
def test_lanes_equal_one_at_a_time(kind, optimizer, core):
    found = []
    for lanes in (1, 8):  # ten clients in eight lanes: two are refilled
        executor = world(kind, lanes)
        given = orders(executor.spec, optimizer, core)
        tuned = run(executor, given)
        scored = run(executor, {c: Score(Model(tuned[c].params), "test") for c in CLIENTS})
        found.append((given, tuned, scored))
    (given, one, scores_one), (_, many, scores_many) = found
    assert min(tuned.steps for tuned in one.values()) >= 20
    for client in CLIENTS:
        assert distance(one[client].params, many[client].params) < 1e-10
        assert distance(one[client].params, given[client].models.params) > 1e-2
        assert one[client].steps == many[client].steps
        assert one[client].sums["train_loss"] == pytest.approx(many[client].sums["train_loss"], abs=1e-10)
        for name, (total, count) in scores_one[client].items():
            assert scores_many[client][name] == (pytest.approx(total, abs=1e-9), count)


def test_in_float32_lanes_differ_by_no_more_than_the_library_from_itself():
    """AdamW divides by small numbers, so rounding of 1e-7 shows as up to 1e-4 of a value after 20 steps; the same run
    with its examples' padding changed (another budget of tokens, one lane) differs as much."""

    def trained(lanes: int, tokens: int) -> dict[str, Any]:
        executor = world("bert", lanes, torch.float32)
        executor.tokens = tokens
        return run(executor, {c: orders(executor.spec, ADAMW)[c] for c in few})

    few = CLIENTS[:3]
    one, other, many = trained(1, 120), trained(1, 31), trained(2, 120)
    noise = max(distance(one[c].params, other[c].params) for c in few)
    assert 0 < noise < 1e-3
    assert max(distance(one[c].params, many[c].params) for c in few) < max(10 * noise, 1e-4)


def test_one_lane_depends_on_seed_and_order_alone():
    executor = world("bert", 1)
    given = orders(executor.spec, ADAMW, epochs=1)
    together = run(executor, given)
    alone = run(world("bert", 1), {"c3": given["c3"]}, seed=8)  # the seed that it had as the fourth of six
    assert all(torch.equal(together["c3"].params[key], alone["c3"].params[key]) for key in alone["c3"].params)
    other = run(world("bert", 1), {"c3": given["c3"]}, seed=9)
    assert distance(other["c3"].params, alone["c3"].params) > 1e-5


# -- against PEFT and torch.optim


def peft_model(kind: str, tree: dict[str, torch.Tensor], spec) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """The library's own model with our factors in it, and its parameters by our names."""
    module = {"bert": bert, "llama": llama, "gpt2": gpt2}[kind]().double()
    prefix = "encoder." if kind == "bert" else ""
    paths = [site.removeprefix(prefix) for site in spec.sites]
    rank = tree[f"{next(iter(spec.sites))}/A"].shape[0]
    alpha = spec.alpha * rank / max(RANKS)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=paths, fan_in_fan_out=kind == "gpt2")
    wrapped = peft.get_peft_model(module, config).eval()
    parameters = {}
    for path in paths:
        layer = wrapped.base_model.model.get_submodule(path)
        for name, holder in (("A", layer.lora_A), ("B", layer.lora_B)):
            weight = holder["default"].weight
            weight.data = tree[f"{prefix}{path}/{name}"].clone()
            parameters[f"{prefix}{path}/{name}"] = weight
    return wrapped, parameters


def peft_losses(kind: str, module: Any, parameters: dict[str, torch.nn.Parameter], store, units) -> torch.Tensor:
    """Mean loss of a batch, one example at a time: no padding, no mask."""
    losses = []
    for unit in units:
        ids = torch.from_numpy(store.tokens[store.offsets[unit] : store.offsets[unit + 1]].astype(np.int64))[None]
        if kind == "bert":
            pooled = module(input_ids=ids).last_hidden_state.mean(1)
            logits = functional.linear(pooled, parameters["head/weight"], parameters["head/bias"])
            losses.append(functional.cross_entropy(logits, torch.tensor([store.labels[unit]])))
        else:
            first = int(store.first[unit])
            logits = module(input_ids=ids).logits[0, first - 1 : -1]
            losses.append(functional.cross_entropy(logits, ids[0, first:]))
    return torch.stack(losses).mean()


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("optimizer", [ADAMW, SGD])
def test_a_fit_is_what_peft_and_torch_optim_compute(kind, optimizer):
    executor = world(kind, 4)
    given = dict(list(orders(executor.spec, optimizer, epochs=2).items())[:3])
    tuned = run(executor, given)
    for k, (client, order) in enumerate(given.items()):
        tree = order.models.params
        module, parameters = peft_model(kind, tree, executor.spec)
        if kind == "bert":
            parameters |= {key: torch.nn.Parameter(tree[key].clone()) for key in ("head/weight", "head/bias")}
        own = {"head": [v for key, v in parameters.items() if key.startswith("head")]}
        own["factors"] = [v for key, v in parameters.items() if not key.startswith("head")]
        if optimizer.name == "adamw":
            settings = [{"params": own["factors"]}, {"params": own["head"], "lr": 1e-2, "weight_decay": 0.0}]
            reference = torch.optim.AdamW(settings[: 1 + bool(own["head"])], lr=optimizer.lr, weight_decay=0.01)
        else:
            reference = torch.optim.SGD(own["factors"] + own["head"], lr=0.05, momentum=0.9, weight_decay=0.01)
        units = executor.units(client, "train")
        batches = plan(len(units), order, torch.Generator().manual_seed(5 + k))
        assert sorted(torch.cat(batches).tolist()) == sorted([*range(len(units))] * 2)  # every example, both epochs
        for batch in batches:
            loss = peft_losses(kind, module, parameters, executor.examples, units[batch.numpy()])
            reference.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), optimizer.clip)
            reference.step()
        assert distance(tuned[client].params, {**tree, **{k: v.detach() for k, v in parameters.items()}}) < 1e-10


# -- a lane is a lane


def test_padding_stays_zero_and_a_refilled_lane_starts_afresh():
    executor = world("bert", 2)
    seen: list[float] = []
    original = Fits.step

    def watched(self: Fits) -> Any:
        done = original(self)
        for name, key, shape, start, stop in self.blocks:
            for k, lane in enumerate(self.lanes):
                if lane is not None and key.endswith(("/A", "/B")):
                    rank = min(lane.ready.models[name].params[key].shape)
                    value = self.values[k, start:stop].view(shape)
                    rest = value[rank:] if key.endswith("/A") else value[:, rank:]
                    seen.append(float(rest.abs().max()) if rest.numel() else 0.0)
        return done

    patch = pytest.MonkeyPatch()
    patch.setattr(Fits, "step", watched)
    tuned = run(executor, orders(executor.spec, ADAMW))
    patch.undo()
    assert len(seen) > 500
    assert max(seen) == 0.0
    alone = run(world("bert", 1), {"c5": orders(executor.spec, ADAMW)["c5"]}, seed=10)
    assert distance(tuned["c5"].params, alone["c5"].params) < 1e-10


def test_a_lane_that_diverges_is_named_and_its_neighbours_do_not_notice():
    executor = world("bert", 3)
    given = orders(executor.spec, ADAMW, epochs=2)
    clean = run(executor, {c: given[c] for c in CLIENTS[:3]})
    tree = {key: value.clone() for key, value in given["c1"].models.params.items()}
    tree[f"{next(iter(executor.spec.sites))}/B"][0, 0] = float("inf")
    broken = Fit(Model(tree), given["c1"].train, 2, batch_size=4, optimizer=ADAMW)
    dirty = run(world("bert", 3), {"c0": given["c0"], "c1": broken, "c2": given["c2"]})
    assert isinstance(dirty["c1"], Diverged)
    assert (dirty["c1"].client, dirty["c1"].step) == ("c1", 1)
    assert "client 'c1', step 1: the loss is nan" in str(dirty["c1"])
    for client in ("c0", "c2"):
        assert distance(dirty[client].params, clean[client].params) < 1e-12


def test_divergence_on_the_way_is_caught_before_the_update():
    executor = world("bert", 2)
    given = orders(executor.spec, Optimizer("sgd", 1e120), epochs=2)
    results = run(executor, {c: given[c] for c in CLIENTS[:2]})
    assert all(isinstance(result, Diverged) and result.step > 1 for result in results.values())


def test_proximal_term_pulls_to_the_anchor():
    """With one full batch of SGD: w - lr (g + strength (w - anchor)), where g is the plain gradient."""
    executor = world("bert", 2)
    names = CLIENTS[:2]
    moved = {}
    for strength in (0.0, 0.7):
        given = {}
        for k, client in enumerate(names):
            tree = adapter(executor.spec, RANKS[k], seed=k)
            anchor = {key: value + 0.1 for key, value in tree.items() if not key.endswith("/scale")}
            given[client] = Fit(Model(tree), ("A", "head"), steps=1, batch_size=99, optimizer=Optimizer("sgd", 0.2),
                                proximal=Proximal(strength, anchor))  # fmt: skip
        moved[strength] = run(executor, given)
    for client in names:
        for key, value in moved[0.7][client].params.items():
            trained = key.endswith("/A") or key.startswith("head")
            expected = moved[0.0][client].params[key] + (0.2 * 0.7 * 0.1 if trained else 0.0)
            torch.testing.assert_close(value, expected)


def test_adapter_dropout_is_the_example_s_and_not_the_lane_s():
    one, many = (run(e, orders(e.spec, SGD, epochs=1)) for e in (world("bert", n, dropout=0.3) for n in (1, 4)))
    plain = run(world("bert", 1), orders(world("bert", 1).spec, SGD, epochs=1))
    for client in CLIENTS:
        assert distance(one[client].params, many[client].params) < 1e-10
        assert distance(one[client].params, plain[client].params) > 1e-4


def test_steps_epochs_and_empty_splits():
    executor = world("bert", 2)
    executor.splits["c0"]["holdout"] = np.zeros(0, dtype=np.int64)
    tree = adapter(executor.spec, 2, seed=0)
    # 18 examples in batches of 10 and 8: seven steps are three whole passes and a batch of 10
    exact = run(executor, {"c1": Fit(Model(tree), ("B",), steps=7, batch_size=10)})["c1"]
    assert (exact.steps, exact.sums["train_loss"][1]) == (7, 3 * 18 + 10)
    nothing = run(executor, {"c0": Fit(Model(tree), ("B",), epochs=2, split="holdout")})["c0"]
    assert (nothing.steps, nothing.sums["train_loss"]) == (0, (0.0, 0.0))
    assert distance(nothing.params, tree) == 0
    assert run(executor, {"c0": Score(Model(tree), "holdout")})["c0"] == {}


def test_orders_are_not_modified_and_results_are_their_own():
    executor = world("bert", 3)
    given = orders(executor.spec, ADAMW, epochs=1)
    before = {c: {k: (v.clone(), v._version) for k, v in o.models.params.items()} for c, o in given.items()}
    tuned = run(executor, given)
    for client, order in given.items():
        for key, value in order.models.params.items():
            assert torch.equal(value, before[client][key][0])
            assert value._version == before[client][key][1]
            assert tuned[client].params[key].dtype == value.dtype
            assert tuned[client].params[key].shape == value.shape
    a, b = (tuned[c].params["head/weight"] for c in CLIENTS[:2])
    assert a.data_ptr() != b.data_ptr()
    assert a.is_contiguous()
    assert not a.requires_grad
    for value in tuned[CLIENTS[0]].params.values():  # who keeps one entry of a client keeps nothing else
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_every_client_may_have_an_optimiser_of_its_own_and_none_is_kept():
    """Equal to one at a time; of those that have ended nothing stays."""
    given = {
        client: replace(order, optimizer=replace(ADAMW, lr=1e-3 * (1 + k)))
        for k, (client, order) in enumerate(orders(world("bert", 1).spec, ADAMW, epochs=1).items())
    }
    kept: list[tuple[int, int]] = []
    executor, step = world("bert", 2), Fits.step

    def watched(fits: Fits) -> Any:
        done = step(fits)
        moments = sum(len(stepper.inner.state) for stepper in fits.steppers.values())
        kept.append((len(fits.steppers), moments))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fits, "step", watched)
        many = run(executor, given)
    one = run(world("bert", 1), given)
    assert max(distance(one[client].params, many[client].params) for client in CLIENTS) < 1e-9
    assert max(steppers for steppers, _ in kept) <= 3  # of two lanes, and of one that has just ended
    assert kept[-1][1] == 0


def test_unequal_work_runs_side_by_side():
    """Fits and scores of different shape do not share a pass, and all of them end."""
    executor = world("bert", 4)
    trees = [adapter(executor.spec, 2, seed=k) for k in range(3)]
    jobs = [
        Fit(Model(trees[0]), ("A", "B"), epochs=1),
        Score(Model(trees[1]), "test"),
        Fit(Model(trees[2]), ("B",), epochs=2),
        Score(Model(trees[0]), "test", limit=3),
    ]
    tickets = [executor.submit(Job(order, 1, "c0")) for order in jobs]
    done: dict[int, Any] = {}
    while not executor.idle:
        done |= dict(executor.advance())
    assert sorted(done) == sorted(tickets)
    assert done[tickets[3]]["accuracy"][1] == 3
    assert executor.advance() == []


def test_label_space_of_the_client():
    """A client without a label never predicts it and has no gradient for it."""
    executor = world("bert", 2, own_labels=True)
    store = executor.examples
    kept = {part: rows[store.labels[rows] != 1] for part, rows in executor.splits["c2"].items()}
    executor.splits["c2"] = kept
    tree = adapter(executor.spec, 2, seed=0)
    tree["head/bias"] = torch.tensor([0.0, 50.0, 0.0], dtype=torch.float64)  # would always say label 1
    scored = run(executor, {"c2": Score(Model(tree), "test"), "c3": Score(Model(tree), "test")})
    assert scored["c2"]["loss"][0] / scored["c2"]["loss"][1] < 10 < scored["c3"]["loss"][0] / scored["c3"]["loss"][1]
    tuned = run(executor, {"c2": Fit(Model(tree), ("head",), epochs=1), "c3": Fit(Model(tree), ("head",), epochs=1)})
    assert torch.equal(tuned["c2"].params["head/weight"][1], tree["head/weight"][1])
    assert not torch.equal(tuned["c3"].params["head/weight"][1], tree["head/weight"][1])
    assert executor.label_mask("c2").tolist() == [True, False, True]
    assert dict(executor.facts("c2")[1])[LABELS[1]] == 0
