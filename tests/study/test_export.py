"""A deployed model survives its folder: plain, with several parts and code; copies and merges give the same logits."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from fedlora.adapters.algebra import product, sites
from fedlora.adapters.peft import Base, describe
from fedlora.errors import UserError
from fedlora.federation.memory import quoted
from fedlora.federation.orders import Model, logits
from fedlora.study.algorithm import find
from fedlora.study.code import named, revived
from fedlora.study.config import dumps, parse
from fedlora.study.export import (
    About,
    deployed,
    export,
    load,
    merged,
    save,
)
from study.own_code import Temperature, halves

WIDTH = 16
SITES = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in ("query", "value")]
ABOUT = About(
    {"model": {"name": "tiny"}}, ("no", "yes", "maybe"), "fedit", "ward 7/ä", {"accuracy": 0.75}, ("base = 1",)
)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT


def bert() -> tuple[nn.Module, Base]:
    torch.manual_seed(0)
    config = BertConfig(
        initializer_range=0.3,
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    model = BertForSequenceClassification(config).eval()
    return model, describe(model, "tiny", "SEQ_CLS", "classifier")


def adapter(seed: int, core: bool = False, rank: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tree = {}
    for i, site in enumerate(SITES):
        own = rank + i
        tree |= {
            f"{site}/A": torch.randn(own, WIDTH, generator=draw),
            f"{site}/B": torch.randn(WIDTH, own, generator=draw),
        }
        tree[f"{site}/scale"] = torch.tensor(0.1 * (i + 1))
        if core:
            tree[f"{site}/C"] = torch.randn(own, own, generator=draw)
    return tree


def head(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"head/weight": torch.randn(3, WIDTH, generator=draw), "head/bias": torch.randn(3, generator=draw)}


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model(input_ids=torch.tensor([[3, 7, 11, 2, 30], [5, 5, 1, 9, 40]])).logits


def test_a_plain_model_is_a_peft_folder_that_reads_back(tmp_path) -> None:
    module, base = bert()
    model = Model(adapter(1, core=True) | {"head/weight": head(1)["head/weight"]})
    save(tmp_path / "a", model, base, ABOUT, start=head(2))
    again, about = load(tmp_path / "a")
    assert about == ABOUT
    assert (again.others, again.weights, again.shared, again.predict) == ((), None, (), logits)
    for site in SITES:
        torch.testing.assert_close(product(again.params, site), product(model.params, site), rtol=1e-5, atol=1e-5)
    assert torch.equal(again.params["head/weight"], head(1)["head/weight"])
    assert torch.equal(again.params["head/bias"], head(2)["head/bias"])
    assert {n for n in again.params if n not in model.params} == {"head/bias"}
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(module), tmp_path / "a").eval()
    merged(module, again, base)
    torch.testing.assert_close(outputs(by_peft), outputs(module), rtol=1e-5, atol=1e-5)
    text = (tmp_path / "a" / "README.md").read_text()
    assert 'base_model: "tiny"' in text
    assert "- accuracy: 0.7500" in text
    assert "ward 7/ä" in text


def test_parts_and_their_code_read_back(tmp_path, user_code) -> None:
    _, base = bert()
    params = adapter(1) | head(1) | {"extra/shift": torch.randn(3), "backbone/w": torch.randn(2, 5)}
    shared = (adapter(3), {f"{SITES[0]}/W": torch.randn(WIDTH, WIDTH)})
    model = Model(
        params, (adapter(2, core=True),), user_code.halves, shared, "cnn-2", Temperature(2.5, (1.0, 2.0), halves)
    )
    save(tmp_path / "a", model, base, ABOUT)
    again, _ = load(tmp_path / "a")
    assert (again.weights, again.predict, again.backbone) == (halves, model.predict, "cnn-2")
    assert again.params.keys() == params.keys()
    assert all(torch.equal(again.params[n], params[n]) for n in params)
    for site in SITES:
        torch.testing.assert_close(product(again.others[0], site), product(model.others[0], site), rtol=1e-4, atol=1e-4)
        whole = sum((product(tree, site) for tree in shared if site in sites(tree)), torch.zeros(()))
        torch.testing.assert_close(product(again.shared[0], site), whole, rtol=1e-4, atol=1e-4)
    for part in ("params", "other-1", "shared"):
        assert peft.PeftConfig.from_pretrained(tmp_path / "a" / part).peft_type == "LORA"
    assert "PeftModel" not in (tmp_path / "a" / "README.md").read_text()


def test_constant_weights_stay_one_adapter(tmp_path) -> None:
    module, base = bert()
    model = Model(adapter(1) | head(1), (adapter(2),), (0.75, -0.5), (adapter(3, rank=9),))
    save(tmp_path / "a", model, base, ABOUT)
    again, _ = load(tmp_path / "a")
    assert again.others == again.shared == ()
    one, two = copy.deepcopy(module), copy.deepcopy(module)
    merged(one, model, base)
    merged(two, again, base)
    torch.testing.assert_close(outputs(one), outputs(two), rtol=1e-5, atol=1e-5)
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(module), tmp_path / "a").eval()
    torch.testing.assert_close(outputs(one), outputs(by_peft), rtol=1e-5, atol=1e-5)
    assert (outputs(one) - outputs(module)).abs().max() > 0.01


def test_merging_by_hand_and_loading_with_transformers(tmp_path) -> None:
    module, base = bert()
    model = Model(adapter(1) | head(1))
    wanted = copy.deepcopy(module)
    with torch.no_grad():
        for site in SITES:
            a, b, scale = (model.params[f"{site}/{n}"] for n in ("A", "B", "scale"))
            wanted.get_submodule(site).weight += scale * torch.einsum("or,ri->oi", b, a)
        wanted.classifier.weight.copy_(head(1)["head/weight"])
        wanted.classifier.bias.copy_(head(1)["head/bias"])
    merged(module, model, base)
    module.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(again), outputs(wanted), rtol=1e-5, atol=1e-5)


def test_merging_into_transposed_and_tied_weights() -> None:
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    before = copy.deepcopy(module)
    base = describe(module, "gpt2", "CAUSAL_LM", "lm_head")
    site, table = "transformer.h.0.attn.c_attn", torch.randn(50, 8)
    a, b = torch.randn(2, 8), torch.randn(24, 2)
    tree = {f"{site}/A": a, f"{site}/B": b, f"{site}/scale": torch.tensor(0.5)}
    merged(module, Model(tree | {"embedding/transformer.wte.weight": table}), base)
    difference = module.get_submodule(site).weight - before.get_submodule(site).weight
    torch.testing.assert_close(difference, 0.5 * (b @ a).T)
    assert torch.equal(module.lm_head.weight, table)


def test_only_known_code_is_named_and_run(tmp_path, user_code) -> None:
    assert revived(named(Temperature(2.0)), tmp_path) == Temperature(2.0)
    assert revived(named(halves), tmp_path) is halves
    for code, words in ((lambda o, p: o, "top level"), (Temperature(torch.ones(2)), "holds a Tensor")):
        with pytest.raises(UserError, match=words):
            named(code)
    for name, words in (
        ("os:system", "no algorithm of fedlora's"),
        ("fedlora.study.folder:os.system", "no algorithm of fedlora's"),
        ("fedlora.cli:run", "no algorithm of fedlora's"),
        ("fedlora_user_absent:f", "no algorithm of fedlora's"),
        ("fedlora.federation.orders:gone", "does not have"),
        ("fedlora.federation.orders:dataclasses.make_dataclass", "does not have"),  # what it imports
        ("fedlora.algorithms.merging:replace", "does not have"),
        ("fedlora.algorithms.gone:f", "does not have"),
    ):
        for fields in ({}, {"fields": {"command": "true"}}):
            with pytest.raises(UserError, match=words):
                revived({"code": name, **fields}, tmp_path)


def run_folder(folder):
    """A finished run's adapters: a global one and two clients', one of a difficult name."""
    _, base = bert()
    names = {None: "global", "ward 7/ä": f"clients/{quoted('ward 7/ä')}", "..": f"clients/{quoted('..')}"}
    for i, (client, place) in enumerate(names.items()):
        about = dataclasses.replace(ABOUT, client=client)
        save(folder / "adapters" / place, Model(adapter(i) | head(i)), base, about)
    return folder


def test_a_client_s_model_is_copied_out_of_a_run(tmp_path) -> None:
    run = run_folder(tmp_path / "run")
    for i, client in enumerate((None, "ward 7/ä", "..")):
        target = export(run, tmp_path / f"to-{i}", client)
        model, about = load(target)
        assert about.client == client
        assert torch.equal(model.params["head/bias"], head(i)["head/bias"])
        assert deployed(target) == deployed(target, client) == target
    with pytest.raises(UserError, match=r"not of client 'x'"):
        deployed(tmp_path / "to-0", "x")
    with pytest.raises(UserError, match="exists and is not empty"):
        export(run, tmp_path / "to-0")
    with pytest.raises(UserError, match=r"no adapter of client 'ward 7/a' \(did you mean 'ward 7/ä'\?\)"):
        export(run, tmp_path / "new", "ward 7/a")
    assert not (tmp_path / "new").exists()


def test_a_missing_model_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="no adapters are there"):
        deployed(tmp_path)
    run = run_folder(tmp_path)
    (run / "adapters" / "global" / "fedlora.json").unlink()
    with pytest.raises(UserError, match="no global model"):
        deployed(run)
    place = deployed(run, "..")
    content = json.loads((place / "fedlora.json").read_text())
    (place / "fedlora.json").write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(UserError, match="format 2 is unknown"):
        load(place)


def test_a_user_s_own_code_is_loaded_with_the_run_that_names_it(tmp_path) -> None:
    """Gates of an algorithm file are found again in a new process; the export alone may not run it."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\nimport torch\nfrom fedlora.federation.algorithm import Algorithm\n"
        "def gate(features, params):\n    return torch.full((len(features), 2), 0.5)\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(Algorithm):\n    pass\n"
    )
    name = f"{file}:Mine"
    module = sys.modules[find(name).__module__]
    _, base = bert()
    model = Model(adapter(1), (adapter(2),), module.gate)
    run = tmp_path / "run"
    save(run / "adapters" / "global", model, base, dataclasses.replace(ABOUT, client=None, algorithm=name))
    config = {"model": {"name": "x", "task": "causal-lm"}, "data": {"train": "x"}, "algorithm": {"name": name}}
    (run / "config.toml").write_text(dumps(parse(config, "the test")))
    export(run, tmp_path / "sent")
    del sys.modules[module.__name__]
    with pytest.raises(UserError, match="no algorithm of fedlora's"):
        load(tmp_path / "sent")
    again, _ = load(deployed(run))
    assert callable(again.weights)
    assert again.weights(torch.zeros(3, 2), {}).shape == (3, 2)


def test_gates_and_predictions_are_not_merged(user_code) -> None:
    module, base = bert()
    with pytest.raises(UserError, match="without --merge"):
        merged(module, Model(adapter(0), (adapter(1),), user_code.halves), base)
