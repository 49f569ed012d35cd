"""Clients with models of their own, from the command line to the exported folder: transformers of different widths,
CNNs, and torch modules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

import fedlora
from fedlora.cli import app
from fedlora.errors import UserError
from fedlora.federation.memory import quoted
from fedlora.learning.cnn import CNN, WIDTHS, CNNConfig
from fedlora.study import export
from fedlora.study.config import load
from fedlora.study.experiment import assemble
from fedlora.study.predict import Prediction, _inputs, scores, stacked
from study import tiny

SHORT = "rounds = 2\nepochs = 1\nbatch_size = 8\nlr = 0.05\neval_every = 0\n"


def decoder(folder: Path) -> Path:
    """A random Llama of width 24, without a head."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=0
    )
    return tiny._saved(transformers.LlamaModel, config, folder)


def cli(*arguments: object) -> str:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def own_logits(folder: Path, client: str, texts: list[str], column: str, models: object = None) -> torch.Tensor:
    """What ``predict`` computes of a client's deployed model, before the softmax."""
    model, about, own = export.opened(export.deployed(folder, client), models)  # type: ignore[arg-type]
    assert own is not None
    return scores(stacked(own, model), model, _inputs(export.config_of(about), own, about, texts))


def two_transformers(tmp_path: Path, algorithm: str = "pfedlora") -> Path:
    tiny.encoder(tmp_path / "wide")
    decoder(tmp_path / "narrow")
    tiny.reviews(tmp_path / "mine.jsonl", rows=90)
    file = tmp_path / "my.toml"
    file.write_text(
        '[model]\ntask = "text-classification"\n[data]\ntrain = "mine.jsonl"\ntext = "text"\nlabel = "label"\n'
        'partition = {clients = 3}\n[clients]\nmodels = ["wide", "narrow"]\n'
        f'[algorithm]\nname = "{algorithm}"\n[training]\n{SHORT}'
    )
    return file


def test_two_transformers_of_different_widths(tmp_path: Path) -> None:
    file, run = two_transformers(tmp_path), tmp_path / "run"
    cli("run", file, "--out", run)
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["personal"]["variants"]) == ["local", "mix"]
    assert summary["global"] is None
    adapter = (3 * 32 + 3 * 3) * 4  # rank 3, width 32, three labels, float32
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(adapter <= lines[1]["bytes"][way] / 3 < adapter + 400 for way in ("up", "down"))
    for line in lines[1:]:
        assert set(line["clients"]) == {"0", "1", "2"}
        for way in ("up", "down"):
            assert sum(one[way] for one in line["clients"].values()) == line["bytes"][way]
        assert sum(one["flops"] for one in line["clients"].values()) == pytest.approx(line["flops"])
    assert lines[1]["clients"]["0"]["flops"] > 2 * lines[1]["clients"]["1"]["flops"]  # the wide one works more
    assert summary["flops"] == sum(line["flops"] for line in lines) > 1e7
    config = load(run / "config.toml")
    assert config.clients.models == [str(tmp_path / "wide"), str(tmp_path / "narrow")]
    assert config.model.name == str(tmp_path / "wide")
    assert (config.model.dtype, config.engine.lanes) == ("float32", 1)
    # every part in its own format: transformers reads each client's model, and the export gives the same logits
    texts = ["the old horse sees", "one big plum near a saw"]
    for client, width in (("0", 32), ("1", 24)):
        logits = own_logits(run, client, texts, "text")
        cli("export", run, "--client", client, "--to", tmp_path / f"export-{client}")
        torch.testing.assert_close(own_logits(tmp_path / f"export-{client}", client, texts, "text"), logits)
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / f"export-{client}/backbone")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / f"export-{client}/backbone")
        assert plain.head.in_features == width  # its map to the common width and its head are one layer
        given = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            found = plain.eval()(given["input_ids"], given["attention_mask"]).logits
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-4)
        assert cli("predict", tmp_path / f"export-{client}", "--text", texts[0]) == cli(
            "predict", run, "--client", client, "--text", texts[0]
        )
        said = cli("evaluate", run, "--data", tmp_path / "mine.jsonl", "--client", client)
        assert "accuracy" in said
    moved = tmp_path / "elsewhere"  # an export needs neither the run nor the models that it began with
    shutil.copytree(tmp_path / "export-1", moved)
    for folder in ("wide", "narrow", "run", "export-1"):
        shutil.rmtree(tmp_path / folder)
    assert fedlora.predict(moved, texts)


def test_resuming_is_not_interrupting(tmp_path: Path) -> None:
    file = two_transformers(tmp_path)
    cli("run", file, "--out", tmp_path / "whole")
    cli("run", file, "--out", tmp_path / "parts", "--set", "training.rounds=1")
    cli("resume", tmp_path / "parts", "--rounds", 2)
    for client in ("0", "1", "2"):
        one, other = (export.opened(export.deployed(tmp_path / name, client))[0] for name in ("whole", "parts"))
        assert one.params.keys() == other.params.keys()
        assert all(torch.equal(one.params[key], other.params[key]) for key in one.params)


def test_a_newcomer_with_a_model_of_its_choice(tmp_path: Path) -> None:
    file, run = two_transformers(tmp_path), tmp_path / "run"
    cli("run", file, "--out", run)
    fresh = tiny.reviews(tmp_path / "fresh.jsonl", rows=30, seed=1)
    cli("personalize", run, "--data", fresh, "--client", "new", "--model", tmp_path / "narrow")
    model, _, own = export.opened(export.deployed(run, "new"))
    assert own is not None
    assert model.backbone == str(tmp_path / "narrow")
    assert model.params["backbone/head.weight"].shape == (32, 24)
    with pytest.raises(UserError, match="not one of the run's"):
        fedlora.personalize(run, fresh, client="other", backbone="wrong")


def photos(folder: Path, labels: int = 3, each: int = 20, size: int = 20) -> Path:
    """Small noise pictures with a bright channel per label."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for label in range(labels):
        (folder / f"class-{label}").mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 90, (size, size, 3), dtype=np.uint8)
            pixels[..., label] += 120
            image.fromarray(pixels).save(folder / f"class-{label}" / f"{i}.png")
    return folder


def test_two_cnns_on_small_images(tmp_path: Path) -> None:
    one = photos(tmp_path / "photos") / "class-0" / "0.png"
    file, run = tmp_path / "my.toml", tmp_path / "run"
    file.write_text(
        '[model]\ntask = "image-classification"\n[data]\ntrain = "photos"\nimage = "image"\nlabel = "label"\n'
        'partition = {clients = 2}\n[clients]\nmodels = ["cnn-5", "cnn-2"]\n[algorithm]\nname = "pfedlora"\n'
        "[training]\nrounds = 3\nepochs = 3\nbatch_size = 8\nlr = 0.02\n"
    )
    cli(
        "run",
        file,
        "--out",
        run,
        "--set",
        "training.eval_every=0",
        "--set",
        "data.labels=['class-2','class-0','class-1']",
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["personal"]["mean"] > 0.8
    memory = next((run / "memories").rglob("1/3.safetensors"))
    assert memory.stat().st_size > 6e6  # the whole CNN-2 lies with the client
    logits = own_logits(run, "1", [str(one)], "image")
    cli("export", run, "--client", "1", "--to", tmp_path / "export")
    torch.testing.assert_close(own_logits(tmp_path / "export", "1", [str(one)], "image"), logits)
    assert cli("predict", tmp_path / "export", "--text", one).startswith("class-0")
    assert cli("predict", run, "--client", "1", "--text", one).startswith("class-0")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_models_every_client_owns_the_base(tmp_path: Path, dtype: str) -> None:
    file, run = tiny.run_file(tmp_path, algorithm='name = "pfedlora"\n', training=SHORT), tmp_path / "run"
    fedlora.run(load(file, [f"model.dtype={dtype}"]), out=run)
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    client = sorted(first["clients"])[0]
    (memory,) = (run / "memories/run" / quoted(client)).glob("2.safetensors")
    held = safetensors.torch.load_file(memory)
    assert {value.dtype for value in held.values()} == {torch.float32}  # what is trained is wider than the base
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        run / "adapters/clients" / quoted(client) / "backbone"
    ).eval()
    given = tiny.tokenizer()(["the old horse"], return_tensors="pt")
    with torch.no_grad():
        found = plain(given["input_ids"], given["attention_mask"]).logits
    torch.testing.assert_close(found, own_logits(run, client, ["the old horse"], "text"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["standalone", "lg-fedavg", "fml", "fedkd", "fedproto", "fedgh"])
def test_baselines_in_one_run_file(tmp_path: Path, algorithm: str) -> None:
    file, run = two_transformers(tmp_path, algorithm), tmp_path / "run"
    summary = fedlora.run(load(file), out=run).summary
    texts = ["the old horse sees"]
    logits = own_logits(run, "1", texts, "text")
    fedlora.export(run, tmp_path / "export", client="1")
    torch.testing.assert_close(own_logits(tmp_path / "export", "1", texts, "text"), logits)
    (said,) = fedlora.predict(tmp_path / "export", texts)
    assert isinstance(said, Prediction)
    np.testing.assert_allclose(list(said.probabilities.values()), logits.softmax(-1)[0], atol=1e-6)
    shared = algorithm in ("fml", "fedkd")
    assert (summary["global"] is not None) == shared
    assert not shared or fedlora.predict(run, texts)


@pytest.mark.parametrize("algorithm", ["fml", "fedkd"])
def test_a_shared_model_may_be_a_whole_one(tmp_path: Path, algorithm: str) -> None:
    one = photos(tmp_path / "photos") / "class-1" / "0.png"
    file, run = tmp_path / "my.toml", tmp_path / "run"
    file.write_text(
        '[model]\nname = "cnn-5"\ntask = "image-classification"\n'
        '[data]\ntrain = "photos"\nimage = "image"\nlabel = "label"\npartition = {clients = 2}\n'
        f'[clients]\nmodels = ["cnn-5", "cnn-2"]\n[algorithm]\nname = "{algorithm}"\n'
        '[adapter]\ntargets = []\nextras = {backbone = "share"}\n'
        '[training]\nrounds = 2\nepochs = 2\nbatch_size = 8\noptimizer = "sgd"\nlr = 0.02\nmomentum = 0.9\n'
    )
    result = fedlora.run(load(file, ["training.eval_every=0"]), out=run)
    assert result.summary["global"]["score"] > 0.8
    size = sum(p.numel() for p in CNN(CNNConfig(WIDTHS["cnn-5"], num_labels=3)).parameters()) * 4
    sent = result.history[-1]["bytes"]
    for way in ("up", "down"):  # FedKD's student travels compressed
        assert sent[way] / 2 < size / 5 if algorithm == "fedkd" else size < sent[way] / 2 < size + 4000
    plain = transformers.AutoModelForImageClassification.from_pretrained(run / "adapters/global/backbone").eval()
    model, about, own = export.opened(run / "adapters/global")
    assert own is not None
    inputs = _inputs(export.config_of(about), own, about, [str(one)])
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, scores(stacked(own, model), model, inputs))


class Bag(nn.Module):
    """A user's own classifier, whose last linear layer is called head."""

    def __init__(self, width: int = 20, head: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(64, width)
        if head:
            self.head = nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = (self.table(ids) * mask[..., None]).sum(1)
        return self.head(hidden) if hasattr(self, "head") else hidden


def test_torch_modules_beside_transformers(tmp_path: Path) -> None:
    file = two_transformers(tmp_path)
    changed = load(file, ["clients.models=['wide', 'bag']"])
    models = {"bag": Bag()}
    fedlora.run(changed, models=models, out=tmp_path / "run")
    texts = ["the old horse sees"]
    logits = own_logits(tmp_path / "run", "1", texts, "text", models)
    state = Bag()
    safetensors.torch.load_model(state, str(tmp_path / "run/adapters/clients/1/backbone/model.safetensors"))
    ids = tiny.tokenizer()(texts, return_tensors="pt")
    torch.testing.assert_close(state(ids["input_ids"], ids["attention_mask"]), logits, atol=1e-5, rtol=1e-4)
    assert fedlora.predict(tmp_path / "run", texts, client="1", models=models)
    with pytest.raises(UserError, match="of your own class"):
        fedlora.predict(tmp_path / "run", texts, client="1")


def test_what_gives_no_representation_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tiny._saved(transformers.T5Model, config, tmp_path / "t5")
    file = two_transformers(tmp_path)

    def refused(reason: str, *changes: str, **given: nn.Module) -> None:
        with pytest.raises(UserError, match=reason):
            fedlora.run(load(file, changes), models=given, out=tmp_path / "run")

    refused("t5' gives no representation of an example: You must", "clients.models=['wide', 't5']")
    refused("bag' gives no representation.*no linear head", "clients.models=['wide', 'bag']", bag=Bag(head=False))
    refused("nothing' gives no representation", "clients.models=['wide', 'nothing']")
    refused("adapters on one base", "algorithm.name=fedit")
    spoken = load(file).replace(model={"task": "causal-lm"}, data={"label": None})
    with pytest.raises(UserError, match="no labels in common"):
        fedlora.run(spoken, out=tmp_path / "run")
    refused("'base' stands for", "clients.models=['base']")


class Odd(Bag):
    """A classifier that gives what no client can learn from."""

    def __init__(self, gives: str) -> None:
        super().__init__()
        self.gives = gives

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        found = super().forward(ids, mask)
        return {"mean": found.mean(0, keepdim=True), "tuple": (found,), "nan": found / 0 * 0}[self.gives]


def test_why_a_module_is_refused(tmp_path: Path) -> None:
    file = load(two_transformers(tmp_path), ["clients.models=['wide', 'bag']"])
    given: dict[str, Any] = {
        r"shape \(1, 32\), not \(2, 32\)": Odd("mean"),  # one example alone would not tell
        r"it gives a tuple, not an array of shape \(2, 32\)": Odd("tuple"),
        "its numbers are not finite": Odd("nan"),
        "models: 'bag' is given as a type, not as a torch module": Bag,
    }
    for reason, module in given.items():
        with pytest.raises(UserError, match=reason):
            fedlora.run(file, models={"bag": module}, out=tmp_path / "run")
    with pytest.raises(UserError, match=r"nothing is called 'bga' in .*wide, bag"):  # not: left out without a word
        fedlora.run(file, models={"bag": Bag(), "bga": Bag()}, out=tmp_path / "run")


def test_a_base_that_is_everybodys_own_model_is_looked_at_too(tmp_path: Path) -> None:
    file = tiny.run_file(tmp_path, algorithm='name = "pfedlora"\n', training=SHORT)
    broken = transformers.AutoModel.from_pretrained(tmp_path / "model")
    broken.encoder.layer[0].output.dense.weight.data[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"\[model\] name = .* gives no representation.*not finite"):
        fedlora.run(load(file), out=tmp_path / "run")


def test_modules_alone_need_no_other_model_and_no_linear_layer(tmp_path: Path) -> None:
    file = load(two_transformers(tmp_path), ["clients.models=['bag']"])
    module = Bag()
    with pytest.raises(UserError, match="'bag' has no tokenizer"):
        fedlora.run(file, models={"bag": module}, out=tmp_path / "run")
    module.processor = tiny.tokenizer()  # type: ignore[assignment]
    summary = fedlora.run(file, models={"bag": module}, out=tmp_path / "run").summary
    assert set(summary["personal"]["per_client"]) == {"0", "1", "2"}
    assert fedlora.predict(tmp_path / "run", ["the old horse"], client="2", models={"bag": module})


def test_modules_of_one_class_read_texts_with_their_own_tokenizers(tmp_path: Path) -> None:
    file, words = load(two_transformers(tmp_path), ["clients.models=['wide', 'one', 'other']"]), tiny.tokenizer()
    reverse = {word: len(words) - 1 - i for word, i in words.get_vocab().items()}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(reverse, "[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    modules = {"one": Bag(), "other": Bag()}
    modules["one"].processor = words  # type: ignore[assignment]
    modules["other"].processor = transformers.PreTrainedTokenizerFast(  # type: ignore[assignment]
        tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]"
    )
    stores: Any = assemble(file, tmp_path / "run", models=modules).learner.examples
    one, other = (stores[name].tokens[:4] for name in ("one", "other"))
    assert (one + other == len(words) - 1).all()
