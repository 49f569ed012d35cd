"""FlexLoRA against dense numpy: exact sums, best approximations, dead rows, scales."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedlora.algorithms.fedit import FedIT
from fedlora.algorithms.flexlora import FlexLoRA
from fedlora.federation.algorithm import Update
from fedlora.federation.orders import Optimizer, Training
from fedlora.federation.spec import Client, Extras, ModelSpec, derive
from fedlora.study.config import load
from fedlora.study.experiment import assemble
from fedlora.study.run import Result, run
from reference.fake import SITES, SPEC, Fake, array, client, close, dense, local, train
from study import tiny

MIXED = [client("a", 1, 10), client("b", 2, 30), client("c", 4, 60)]
SHARES = (0.1, 0.3, 0.6)


def best(matrix: Any, rank: int) -> Any:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def norm(matrix: Any) -> float:
    return float(np.sqrt((np.asarray(matrix) ** 2).sum()))


@pytest.mark.parametrize("scaling", ["shared", "per-rank"])
def test_exact_sum_and_best_approximation_for_every_rank(scaling: Any) -> None:
    spec, flex = replace(SPEC, scaling=scaling), FlexLoRA()
    state, updates = train(flex, flex.server_init(spec, 0), MIXED, spec=spec)
    for site, (out, inner) in SITES.items():
        scales = {float(updates[c.id].arrays[f"{site}/scale"]) for c in MIXED}
        ranks = {"down": (1, 2, 4), "up": (1, 2, 3)}[site]
        largest = spec.ranks[site]
        assert scales == ({6.0 / largest} if scaling == "shared" else {6.0 / r for r in ranks})
        exact = sum(p * dense(updates[c.id].arrays, site) for p, c in zip(SHARES, MIXED))
        assert exact.shape == (out, inner)
        model = flex.server_model(state)
        assert model is not None
        close(dense_of(model.shared[0], site), exact)
        for who, rank in zip(MIXED, ranks):
            served = flex.broadcast(state, who, 2)
            assert served[f"{site}/A"].shape == (rank, inner)
            assert served[f"{site}/B"].shape == (out, rank)
            assert float(served[f"{site}/scale"]) == 6.0 / (largest if scaling == "shared" else rank)
            np.testing.assert_allclose(dense(served, site), best(exact, rank), atol=1e-12)
            np.testing.assert_allclose(
                array(served[f"{site}/A"]) @ array(served[f"{site}/A"]).T, np.eye(rank), atol=1e-12
            )
        lost = norm(exact - best(exact, largest)) / norm(exact)
        assert flex.measures(state)[f"truncation/{site}"] == pytest.approx(lost, abs=1e-12)


def dense_of(tree: Any, site: str) -> Any:
    return array(tree[f"{site}/W"]) if f"{site}/W" in tree else dense(tree, site)


@pytest.mark.parametrize(("out", "inner"), [(31, 12), (12, 31)])
@pytest.mark.parametrize("count", [2, 9])  # sums of ranks below and above min(out, in)
@pytest.mark.parametrize("kind", ["full", "deficient", "zero"])
def test_float32_error_is_below_1e_5(out: int, inner: int, count: int, kind: str) -> None:
    """Mixed scales, whatever the shapes: |s_r B A - best| / |dW| <= 1e-5."""
    spec = ModelSpec({"q": (out, inner)}, {"q": 8}, {}, (), 4, alpha=16.0, scaling="per-rank")
    flex, stream = FlexLoRA(), np.random.default_rng(count)
    total, exact, weight = flex.aggregator.zero(), np.zeros((out, inner)), 0
    for k in range(count):
        rank, examples = (2, 4, 8)[k % 3], 5 + k
        a, b = stream.normal(size=(rank, inner)).astype("f"), stream.normal(size=(out, rank)).astype("f")
        if kind != "full":
            b[:, (1 if kind == "deficient" else 0) :] = 0
        arrays = {"q/A": torch.tensor(a), "q/B": torch.tensor(b), "q/scale": torch.tensor(16.0 / rank)}
        total = flex.aggregator.accumulate(total, Client(str(k), {"q": rank}), Update(arrays, examples, {}))
        exact += examples * 16.0 / rank * b.astype("d") @ a.astype("d")
        weight += examples
    exact /= weight
    state = flex.server_update(flex.server_init(spec, 0), flex.aggregator.report(total), 1)
    for rank in (1, 2, 4, 8):
        served = flex.broadcast(state, Client("x", {"q": rank}), 2)
        assert served["q/A"].dtype == torch.float32
        assert norm(dense(served, "q") - best(exact, rank)) <= 1e-5 * max(norm(exact), 1e-30)
        assert np.linalg.matrix_rank(array(served["q/A"])) == rank  # no dead rows, even after a round of zeros
    assert flex.measures(state)["truncation/q"] == pytest.approx(
        norm(exact - best(exact, 8)) / max(norm(exact), 1e-300), abs=1e-6
    )


def test_a_large_client_regains_rank_after_a_round_of_small_ones() -> None:
    flex = FlexLoRA()
    state, _ = train(flex, flex.server_init(SPEC, 0), [client("a", 1)])
    served = flex.broadcast(state, client("c", 4), 2)
    assert np.linalg.matrix_rank(dense(served, "down")) == 1
    assert np.linalg.matrix_rank(array(served["down/A"])) == 4
    assert float(served["down/B"][:, 1:].abs().max()) == 0
    state, updates = train(flex, state, [client("c", 4)], round=2)
    assert np.linalg.matrix_rank(dense(updates["c"].arrays, "down")) > 2


def test_order_of_replies_decides_nothing() -> None:
    flex = FlexLoRA()
    _, updates = train(flex, flex.server_init(SPEC, 0), MIXED)
    states = []
    for order in (MIXED, MIXED[::-1]):
        total = flex.aggregator.zero()
        for who in order:
            total = flex.aggregator.accumulate(total, who, updates[who.id])
        states.append(flex.server_update(flex.server_init(SPEC, 0), flex.aggregator.report(total), 1))
    for key, value in states[0]["served"].items():
        close(states[1]["served"][key], array(value), 1e-10)


def test_before_the_first_round_smaller_ranks_are_prefixes_of_the_shared_start() -> None:
    flex = FlexLoRA()
    state = flex.server_init(SPEC, 0)
    served = flex.broadcast(state, client("a", 2), 1)
    start = SPEC.adapter(SPEC.ranks, 0)
    assert torch.equal(served["down/A"], start["down/A"][:2])
    assert float(served["down/B"].abs().max()) == 0
    assert served["down/A"].data_ptr() == state["served"]["down/A"].data_ptr()  # served as a view


def test_head_is_a_weighted_mean_and_stays_if_private() -> None:
    flex = FlexLoRA()
    begun = flex.server_init(SPEC, 0)
    state, updates = train(flex, begun, MIXED)
    by_hand = array(SPEC.start(0)["head/weight"]) + sum(
        p * array(updates[c.id].arrays["head/weight"]) for p, c in zip(SHARES, MIXED)
    )
    close(state["whole"]["head/weight"], by_hand)
    private, memories = FlexLoRA(extras=Extras(head="private")), {}
    state, updates = train(private, private.server_init(SPEC, 0), MIXED, memories=memories)
    assert not any(key.startswith("head/") for key in updates["a"].arrays)
    assert set(memories["a"]) == {"head/weight", "head/bias"}
    assert private.server_model(state) is None


def test_variants_and_one_epoch() -> None:
    flex, fake = FlexLoRA(finetune_epochs=2, training=Training(optimizer=Optimizer(lr=0.1), schedule="cosine")), Fake()
    assert FlexLoRA().training.epochs == 1
    payload = flex.broadcast(flex.server_init(SPEC, 0), MIXED[1], 5)
    variants = fake.run(flex.personalize(payload, {}, local(MIXED[1], 5, 5)))
    assert list(variants) == ["finetuned", "truncated"]
    assert (fake.log[0].epochs, fake.log[0].optimizer.lr) == (2, 0.1)
    assert fake.log[0].train == ("A", "B", "head")


def test_rows_without_a_singular_value_are_the_seeded_completion() -> None:
    """Whoever merges by SVD (FlexLoRA, FedIT with merge = "svd") fills them by the seed of run, round and site: never
    with the SVD's own null vectors, which rounding decides, and never with the same rows in every round or site."""
    two = [client("a", 1, 10), client("b", 1, 30)]
    for method in (FlexLoRA(), FedIT(merge="svd")):
        fills: dict[Any, Any] = {}
        for seed, round in ((0, 1), (0, 2), (1, 1)):
            served = []
            for order in (two, two[::-1]):
                begun = method.server_init(SPEC, seed)
                updates = {c.id: rank_one(c, SPEC.adapter(c.ranks, seed)) for c in two}
                total = method.aggregator.zero()
                for who in order:
                    total = method.aggregator.accumulate(total, who, updates[who.id])
                state = method.server_update(begun, method.aggregator.report(total), round)
                served.append(method.broadcast(state, client("c", 4), round + 1))
            for key, value in served[0].items():
                close(served[1][key], array(value), 1e-12)
            for site, rank in (("down", 4), ("up", 3)):
                a = array(served[0][f"{site}/A"])
                fills[seed, round, site] = a[2:]
                kept = a[:2]  # two clients of rank 1
                stream = torch.Generator().manual_seed(derive(derive(seed, round, site), "complete"))
                draw = torch.randn(rank - 2, SITES[site][1], generator=stream, dtype=torch.float64).numpy()
                new = draw - draw @ np.linalg.pinv(kept) @ kept  # the part of the draw that nobody spans yet
                onto = np.linalg.pinv(new) @ new
                np.testing.assert_allclose(a[2:].T @ a[2:], onto, atol=1e-10)
                assert float(served[0][f"{site}/B"][:, 2:].abs().max()) == 0
        assert np.abs(fills[0, 1, "down"] - fills[0, 2, "down"]).max() > 0.01
        assert np.abs(fills[0, 1, "down"] - fills[1, 1, "down"]).max() > 0.01


def rank_one(who: Client, start: Any) -> Update:
    """What a client of rank 1 sends."""
    noise = torch.Generator().manual_seed(ord(who.id))
    arrays = {}
    for key, value in start.items():
        drawn = torch.randn(value.shape, generator=noise, dtype=value.dtype)
        arrays[key] = value if key.endswith("/scale") else value + drawn
    return Update(arrays, float(who.examples or 1), {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Runs of the paper's four resource types on a model of 32 and 48 features; one client never trains."""
    folder = tmp_path_factory.mktemp("types")
    config = {
        "model": {"name": str(tiny.language_model(folder / "lm")), "task": "causal-lm", "dtype": "float32"},
        "data": {
            "train": str(tiny.reviews(folder / "mine.jsonl", 60)),
            "text": "text",
            "partition": {"clients": 5},
            "holdout_clients": 1,
        },
        "clients": {"ranks": "uniform"},
        "training": {"rounds": 2, "lr": 0.02, "eval_every": 0},
    }
    algorithms = {"flexlora": {"name": "flexlora"}, "svd": {"name": "fedit", "merge": "svd"}}
    algorithms["bucket"] = {"name": "fedit", "merge": "bucket"}
    return {name: run({**config, "algorithm": own}, out=folder / name) for name, own in algorithms.items()}


def ranks_written(result: Result, client: str) -> set[tuple[int, int]]:
    """(rank, count) of attention and MLP layers in a client's adapter file."""
    tensors = load_file(result.folder / "adapters" / "clients" / client / "adapter_model.safetensors")
    found = {(len(v), "self_attn" in name) for name, v in tensors.items() if name.endswith("lora_A.weight")}
    return {(attention, mlp) for attention, is_own in found if is_own for mlp, other in found if not other}


@pytest.mark.slow
def test_the_papers_resource_types_end_to_end(finished: dict[str, Result]) -> None:
    """Types 1 to 4 are ranks 8, 30, 30 and 200 by site, 200: at most min(out, in) = 32."""
    flex = finished["flexlora"]
    fleet = assemble(load(flex.folder / "config.toml"), flex.folder).fleet
    held = {
        who.id: {(who.ranks[a], who.ranks[b]) for a in who.ranks if "self_attn" in a for b in who.ranks if "mlp" in b}
        for who in fleet.clients.values()
    }
    kinds = [next(iter(pairs)) for pairs in held.values() if len(pairs) == 1]
    assert Counter(kinds) == Counter({(8, 8): 2, (30, 30): 1, (30, 32): 1, (32, 32): 1})
    (unseen,) = set(held) - set(flex.summary["personal"]["per_client"])
    for name in set(held) - {unseen}:
        assert ranks_written(flex, name) == held[name]
        assert ranks_written(finished["bucket"], name) == {(8, 8)}  # the smallest client's, without being told
    for line in flex.history[1:]:
        errors = {name: value for name, value in line["measures"].items() if name.startswith("truncation/")}
        assert len(errors) == 14  # every site, every round
        assert all(0 <= value < 1 for value in errors.values())
    assert flex.summary["global"]["score"] != flex.summary["personal"]["mean"]  # undecomposed beside truncated
    for result in finished.values():
        assert result.summary["unseen"]["clients"] == 1
        assert 0 < result.summary["unseen"]["zero-shot"]["score"] < 20


@pytest.mark.slow
def test_a_run_of_fedit_that_merges_by_svd_is_flexlora(finished: dict[str, Result]) -> None:
    one, two = finished["flexlora"], finished["svd"]
    for key in ("personal", "global", "unseen", "bytes"):
        assert one.summary[key] == two.summary[key], key
    for a, b in zip(one.history, two.history, strict=True):
        assert a.get("measures") == b.get("measures")
    for place in ("global", *(f"clients/{name}" for name in one.summary["personal"]["per_client"])):
        left, right = (load_file(r.folder / "adapters" / place / "adapter_model.safetensors") for r in (one, two))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert finished["bucket"].summary["global"] != one.summary["global"]
