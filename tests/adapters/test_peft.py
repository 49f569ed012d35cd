"""PEFT's own loader gives our logits for every kind of model; reading gives back what was written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedlora.adapters.inject import inject
from fedlora.adapters.peft import Base, change, describe, flatten, read, to_peft, write
from fedlora.federation.orders import Model
from fedlora.federation.spec import Tree

WIDTH, SPREAD = 16, 0.3
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT


def bert() -> tuple[nn.Module, Base]:
    """12 blocks, so that "layer.1" could be taken for "layer.11"."""
    torch.manual_seed(0)
    config = BertConfig(
        initializer_range=SPREAD,
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    model = BertForSequenceClassification(config).eval()
    return model, describe(model, "bert", "SEQ_CLS", "classifier")


def distilbert() -> tuple[nn.Module, Base]:
    """Its `pre_classifier` ends with a name that PEFT replaces unasked."""
    torch.manual_seed(1)
    config = DistilBertConfig(
        initializer_range=SPREAD, vocab_size=50, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=24, num_labels=3
    )
    model = DistilBertForSequenceClassification(config).eval()
    return model, describe(model, "distilbert", "SEQ_CLS", "classifier")


def roberta() -> tuple[nn.Module, Base]:
    """Our head is the last layer of what PEFT replaces as the whole classifier."""
    torch.manual_seed(1)
    config = RobertaConfig(
        initializer_range=SPREAD,
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    model = RobertaForSequenceClassification(config).eval()
    return model, describe(model, "roberta", "SEQ_CLS", "classifier.out_proj")


def llama() -> tuple[nn.Module, Base]:
    torch.manual_seed(2)
    config = LlamaConfig(
        initializer_range=SPREAD,
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    return model, describe(model, "llama", "CAUSAL_LM", "lm_head")


def gpt2() -> tuple[nn.Module, Base]:
    torch.manual_seed(3)
    model = GPT2LMHeadModel(
        GPT2Config(initializer_range=SPREAD, vocab_size=50, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32)
    ).eval()
    return model, describe(model, "gpt2", "CAUSAL_LM", "lm_head")


MODELS = {f.__name__: f for f in (bert, distilbert, roberta, llama, gpt2)}
TARGETS = {
    "bert": ("query", "value", "intermediate.dense"),
    "distilbert": ("q_lin", "lin1"),
    "roberta": ("query", "intermediate.dense"),
    "llama": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj"),
}


@pytest.mark.parametrize("name", MODELS)
def test_adapted_layers_count_as_what_they_wrap(name: str) -> None:
    module, base = MODELS[name]()
    places = shapes(module, base, name)
    inject(module, {site: module.get_submodule(site) for site in places})
    again = describe(module, base.name, base.task, base.head)
    assert list(again.values) == list(base.values)
    assert again.transposed == base.transposed
    assert bool(again.transposed) == (name == "gpt2")


def shapes(model: nn.Module, base: Base, name: str) -> dict[str, tuple[int, int]]:
    found = {}
    for path, module in model.named_modules():
        if path.endswith(TARGETS[name]):
            out, inner = module.weight.shape  # type: ignore[misc]
            found[path] = (inner, out) if path in base.transposed else (out, inner)
    assert found
    return found


def adapter(
    places: Mapping[str, tuple[int, int]], rng: np.random.Generator, core: bool, top: int = 5, strength: float = 1.0
) -> dict[str, Tensor]:
    """A trained adapter: another rank and scale at every site, B not zero."""
    tree = {}
    for site, (out, inner) in places.items():
        rank = int(rng.integers(1, top + 1))
        tree[f"{site}/A"] = torch.tensor(rng.normal(size=(rank, inner)), dtype=torch.float32)
        tree[f"{site}/B"] = torch.tensor(rng.normal(size=(out, rank)) * strength, dtype=torch.float32)
        tree[f"{site}/scale"] = torch.tensor(float(rng.choice([0.1, 0.3, 1.0, 2.0, 1 / 7])), dtype=torch.float32)
        if core:
            tree[f"{site}/C"] = torch.tensor(rng.normal(size=(rank, rank)), dtype=torch.float32)
    return tree


def dense(tree: Tree, site: str) -> np.ndarray:
    """s B C A in NumPy, float64."""
    if f"{site}/W" in tree:
        return tree[f"{site}/W"].double().numpy()
    left, right = tree[f"{site}/B"].double().numpy(), tree[f"{site}/A"].double().numpy()
    core = tree[f"{site}/C"].double().numpy() if f"{site}/C" in tree else np.eye(left.shape[1])
    return float(tree[f"{site}/scale"]) * np.einsum("or,rq,qi->oi", left, core, right)


def reference(module: nn.Module, base: Base, changes: Mapping[str, np.ndarray], whole: Tree) -> nn.Module:
    """A copy of the base whose weights are changed by hand."""
    changed = copy.deepcopy(module).double()
    parameters = dict(changed.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for site, delta in changes.items():
            value = torch.tensor(delta)
            parameters[f"{site}.weight"].add_(value.T if site in base.transposed else value)
        for path, value in whole.items():
            parameters[path].copy_(value)
    return changed


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    ids = torch.tensor([[3, 7, 11, 2, 30], [5, 5, 1, 9, 40]])
    return model(input_ids=ids).logits.double()


def loaded(module: nn.Module, folder) -> nn.Module:
    with warnings.catch_warnings():
        # PEFT's hints on adapters of tied embeddings and of Conv1D
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return peft.PeftModel.from_pretrained(copy.deepcopy(module), folder).eval()


def check(module: nn.Module, base: Base, model: Model, changes, whole: Tree, folder, start: Tree | None = None) -> None:
    write(folder, *to_peft(model, base, start))
    wanted, got = outputs(reference(module, base, changes, whole)), outputs(loaded(module, folder))
    assert (wanted - outputs(module)).abs().max() > 0.01
    assert (wanted - got).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_loader_gives_the_logits_of_one_adapter(name: str, core: bool, tmp_path) -> None:
    module, base = MODELS[name]()
    places = shapes(module, base, name)
    tree = adapter(places, np.random.default_rng(0), core, strength=0.1)
    head = {}
    if base.task == "SEQ_CLS":
        head = {"head/weight": torch.randn(3, WIDTH), "head/bias": torch.randn(3)}
    whole = {base.path(n): v for n, v in head.items()}
    check(module, base, Model(tree | head), {s: dense(tree, s) for s in places}, whole, tmp_path)


def test_a_pattern_never_matches_a_longer_path(tmp_path) -> None:
    """layer.1 has its own rank and scale, layer.11 the default: a pattern that is not anchored would mix them."""
    module, base = bert()
    sites = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(12)]
    tree = {}
    for i, site in enumerate(sites):
        rank = 4 if i == 1 else 2
        tree |= {f"{site}/A": torch.randn(rank, WIDTH), f"{site}/B": torch.randn(WIDTH, rank)}
        tree[f"{site}/scale"] = torch.tensor(3.0 if i == 1 else 0.5)
    config, _ = to_peft(Model(tree), base)
    assert (config["r"], config["lora_alpha"]) == (2, 1)
    assert list(config["rank_pattern"].values()) == [4]
    assert list(config["alpha_pattern"].values()) == [12]
    check(module, base, Model(tree), {s: dense(tree, s) for s in sites}, {}, tmp_path)
    # a nested path that ends with another site's whole path
    short = {"a.b/A": torch.ones(1, 3), "a.b/B": torch.ones(2, 1), "a.b/scale": torch.tensor(5.0)}
    nested = {f"x.{n}": torch.cat([v, v], 0 if n[-1] == "A" else 1) if v.dim() else v / 5 for n, v in short.items()}
    other = {f"y.{n}": v for n, v in nested.items()}
    write(tmp_path / "n", *to_peft(Model(short | nested | other), Base("b")))
    again = read(tmp_path / "n")
    assert float(again["a.b/scale"]) == 5
    assert float(again["x.a.b/scale"]) == 1


def test_norms_embeddings_and_tied_weights(tmp_path) -> None:
    module, base = gpt2()
    places = shapes(module, base, "gpt2")
    tree = adapter(places, np.random.default_rng(1), False, strength=0.1)
    norm, embedding = torch.randn(WIDTH), torch.randn(50, WIDTH)
    # only the weight of the norm is named: its bias must come from the base
    extra = {"norm/transformer.h.0.ln_1.weight": norm, "embedding/transformer.wte.weight": embedding}
    whole = {"transformer.h.0.ln_1.weight": norm, "transformer.wte.weight": embedding}
    assert base.aliases("transformer.wte.weight") == ["lm_head.weight"]
    check(module, base, Model(tree | extra), {s: dense(tree, s) for s in places}, whole, tmp_path)


def test_a_head_the_base_lacks_is_always_saved(tmp_path) -> None:
    """Also where the model names none (a frozen head): a fresh copy of the base would draw another one."""
    module, base = bert()
    head = {"head/weight": torch.randn(3, WIDTH), "head/bias": torch.randn(3)}
    whole = {n.replace("head/", "classifier."): v for n, v in head.items()}
    check(module, base, Model({}), {}, whole, tmp_path / "no adapter at all", start=head)
    kept, other = to_peft(Model({}), base, start=head), to_peft(Model({"head/bias": torch.ones(3)}), base, start=head)
    assert torch.equal(other[1]["base_model.model.classifier.bias"], torch.ones(3))
    assert torch.equal(kept[1]["base_model.model.classifier.bias"], head["head/bias"])


@pytest.mark.parametrize(("count", "way"), [(2, "stacked"), (9, "svd")])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_several_adapters_and_shared_changes_become_one(name: str, count: int, way: str, tmp_path) -> None:
    module, base = MODELS[name]()
    places = shapes(module, base, name)
    rng = np.random.default_rng(2)
    trees = [adapter(places, rng, core=i % 2 == 1, strength=0.05) for i in range(count)]
    shared = (adapter(places, rng, False, top=2, strength=0.05),)
    weights = tuple(float(w) for w in rng.uniform(-1.5, 1.5, count))
    model = Model(trees[0], tuple(trees[1:]), weights, shared)
    changes = {s: sum(w * dense(t, s) for w, t in zip(weights, trees)) + dense(shared[0], s) for s in places}
    one = flatten(model)
    total = {s: sum(t[f"{s}/A"].shape[0] for t in (*trees, *shared)) for s in places}
    for site, (out, inner) in places.items():
        assert one[f"{site}/A"].shape[0] == min(total[site], out, inner)
        assert np.linalg.norm(dense(one, site) - changes[site]) <= 1e-6 * np.linalg.norm(changes[site])
    assert any(t <= min(places[s]) for s, t in total.items()) == (way == "stacked")
    check(module, base, model, changes, {}, tmp_path)


def test_one_adapter_with_a_weight_only_changes_its_scale() -> None:
    tree = {"q/A": torch.randn(2, 5), "q/B": torch.randn(4, 2), "q/scale": torch.tensor(0.3)}
    one = flatten(Model(tree, weights=(-0.7,)))
    assert one["q/A"] is tree["q/A"]
    assert one["q/B"] is tree["q/B"]
    assert float(one["q/scale"]) == -0.7 * float(tree["q/scale"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.integers(0, 4), st.booleans())
def test_dense_changes_of_any_rank_and_shape(seed: int, out: int, inner: int, rank: int, mixed: bool) -> None:
    """A float32 sum of products, as a server stores it: the rank found is the true one, zero included."""
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=(out, rank)) @ rng.normal(size=(rank, inner))
    tree = {"q/W": torch.tensor(exact, dtype=torch.float32)}
    params = adapter({"q": (out, inner)}, rng, core=True) if mixed else {}
    one = flatten(Model(params, shared=(tree,)))
    wanted = tree["q/W"].double().numpy() + (dense(params, "q") if mixed else 0)
    assert one["q/A"].shape[0] <= min(out, inner)
    assert np.linalg.norm(dense(one, "q") - wanted) <= 1e-6 * np.linalg.norm(wanted)
    np.testing.assert_allclose(change(Model(params, shared=(tree,)))["q"].numpy(), dense(one, "q"), atol=1e-12)
    if not mixed and rank <= min(out, inner):
        assert one["q/A"].shape[0] == max(rank, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.booleans())
def test_reading_gives_back_what_was_written(tmp_path_factory, seed: int, count: int, alone: bool) -> None:
    rng = np.random.default_rng(seed)
    names = ["q", "h.1.q", "h.11.q", "h.1.q.x-y", "x.h.1.q", "a+b.c_1"]
    places = {n: (int(rng.integers(1, 9)), int(rng.integers(1, 9))) for n in names[:count]}
    tree = {} if alone else adapter(places, rng, False)
    tree |= {"head/weight": torch.randn(3, 4), "norm/n.weight": torch.randn(4), "embedding/e.weight": torch.randn(5, 4)}
    folder = tmp_path_factory.mktemp("adapter")
    base = Base("somewhere", "SEQ_CLS", "classifier")
    write(folder, *to_peft(Model(tree), base))
    again = read(folder, "classifier")
    assert again.keys() == tree.keys()
    assert all(torch.equal(again[n], tree[n]) and again[n].dtype == tree[n].dtype for n in tree)
    config = peft.PeftConfig.from_pretrained(folder)
    assert (config.base_model_name_or_path, config.bias) == ("somewhere", "none")


def test_peft_s_own_adapters_are_read(tmp_path) -> None:
    """use_rslora, patterns as PEFT understands them, and a head: dense changes equal those that PEFT merges."""
    module, base = bert()
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=6,
        target_modules=["query", "intermediate.dense"],
        rank_pattern={"layer.1.attention.self.query": 3},
        alpha_pattern={r"layer\.\d+\.intermediate\.dense": 9},
    )
    for rslora in (False, True):
        config.use_rslora = rslora
        model = peft.get_peft_model(copy.deepcopy(module), copy.deepcopy(config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not find a config file")
            model.save_pretrained(tmp_path / str(rslora))
        tree = read(tmp_path / str(rslora), "classifier")
        merged = model.merge_and_unload().state_dict()
        assert len([n for n in tree if n.endswith("/scale")]) == 24
        assert torch.equal(tree["head/weight"], merged["classifier.weight"])
        for site in {n[:-2] for n in tree if n.endswith("/A")}:
            delta = (merged[f"{site}.weight"] - base.values[f"{site}.weight"]).double().numpy()
            np.testing.assert_allclose(dense(tree, site), delta, atol=2e-5)
        assert tree["bert.encoder.layer.1.attention.self.query/A"].shape[0] == 3
