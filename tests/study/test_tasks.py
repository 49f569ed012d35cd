"""Whole runs of the other tasks and options: instructions, images, adapters to start from, label spaces, partitions."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fedlora
from fedlora.errors import UserError
from fedlora.learning.loading import load_backbone
from fedlora.study import export
from fedlora.study.after import evaluate
from fedlora.study.config import load
from fedlora.study.predict import predict
from fedlora.study.tasks import max_length
from study import tiny


def run(file: Path, out: Path, *changes: str) -> dict[str, Any]:
    return dict(fedlora.run(load(file, changes), out=out).summary)


def instructions(folder: Path) -> Path:
    """The answer is the topic's first word: learnable, and not from the prompt's words alone."""
    rng = random.Random(0)
    with (folder / "ask.jsonl").open("w") as out:
        for _ in range(90):
            topic = rng.choice(sorted(tiny.TOPICS))
            row = {"question": tiny.sentence(rng, topic) + " ?", "answer": tiny.TOPICS[topic][0]}
            out.write(json.dumps(row) + "\n")
    tiny.language_model(folder / "lm")
    file = folder / "ask.toml"
    file.write_text(
        '[model]\nname = "lm"\ntask = "causal-lm"\ndtype = "float32"\n'
        '[data]\ntrain = "ask.jsonl"\nprompt = "question"\nresponse = "answer"\npartition = {clients = 3}\n'
        '[algorithm]\nname = "fedit"\n[training]\nrounds = 4\nepochs = 4\nbatch_size = 4\nlr = 0.02\n'
    )
    return file


def test_instructions_are_scored_in_bits_and_by_generation(tmp_path: Path) -> None:
    file = instructions(tmp_path)
    bits = run(file, tmp_path / "bits", "training.eval_every=0")
    assert bits["metric"] == "bits_per_byte"
    words = run(file, tmp_path / "words", "training.eval_every=0", "training.generate=2")
    assert words["metric"] == "rougeL"
    assert words["higher_is_better"]
    assert 0.3 < words["global"]["score"] <= 1  # of three answers, one in three by chance
    assert words["global"]["bits_per_byte"] == pytest.approx(bits["global"]["score"], abs=1e-6)
    (answer,) = fedlora.predict(tmp_path / "bits", ["the old horse ?"], client="0")
    assert isinstance(answer, str)


def test_images_in_folders_by_label(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for label, channel in (("blue", 2), ("red", 0)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            image.fromarray(pixels).save(tmp_path / "photos" / label / f"{i}.png")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "do_resize": True}
    settings |= {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    file = tmp_path / "photos.toml"
    file.write_text(
        '[model]\nname = "vit"\ntask = "image-classification"\ndtype = "float32"\n'
        '[data]\ntrain = "photos"\nimage = "image"\nlabel = "label"\npartition = {clients = 3}\n'
        '[algorithm]\nname = "fedit"\n[training]\nrounds = 3\nepochs = 4\nbatch_size = 4\n'
    )
    summary = run(file, tmp_path / "run", "training.eval_every=0")
    assert summary["personal"]["mean"] > 0.8


def test_a_run_starts_from_an_exported_adapter(tmp_path: Path) -> None:
    file = tiny.run_file(tmp_path, training="rounds = 3\nepochs = 3\nbatch_size = 4\n")
    first = run(file, tmp_path / "first", "training.eval_every=0")
    fedlora.export(tmp_path / "first", tmp_path / "adapter")
    begun = fedlora.run(load(file, ["adapter.from=adapter", "training.rounds=1"]), out=tmp_path / "second")
    assert begun.history[0]["global"] == pytest.approx(first["global"]["score"])
    with pytest.raises(UserError, match="does not begin with one given adapter"):
        run(file, tmp_path / "third", "adapter.from=adapter", "algorithm.name=flora")
    with pytest.raises(UserError, match="set bucket_rank to 8 or more"):
        run(file, tmp_path / "small", "adapter.from=adapter", "algorithm.merge=bucket", "algorithm.bucket_rank=2")
    with pytest.raises(UserError, match="rank 8"):
        run(file, tmp_path / "fourth", "adapter.from=adapter", "clients.ranks=[2, 8]", "algorithm.name=flexlora")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    diverged, given = tmp_path / "diverged", load_file(weights)
    shutil.copytree(tmp_path / "adapter", diverged)
    save_file({**given, (name := sorted(given)[-1]): given[name] * torch.nan}, diverged / weights.name)
    with pytest.raises(UserError, match=r"from = .*diverged.*: .* has numbers that are not finite"):
        run(file, tmp_path / "nan", "adapter.from=diverged")
    save_file(load_file(weights) | {"base_model.model.encoder.embeddings.LayerNorm.bias": torch.ones(32)}, weights)
    with pytest.raises(UserError, match=r"brings its own 'encoder.embeddings.LayerNorm.bias'"):
        run(file, tmp_path / "fifth", "adapter.from=adapter")


def test_dirichlet_clients_with_label_spaces_of_their_own(tmp_path: Path) -> None:
    file = tiny.run_file(
        tmp_path,
        data='label_space = "client"\npartition = {by = "dirichlet", clients = 4, alpha = 0.2}\n',
        training="rounds = 3\nepochs = 3\nbatch_size = 4\n",
    )
    summary = run(file, tmp_path / "run", "training.eval_every=0")
    assert load(tmp_path / "run" / "config.toml").adapter.extras.head == "private"  # nothing else was said
    assert summary["global"] is None  # private heads: no single model
    assert summary["personal"]["mean"] > 0.5
    about = export.load(export.deployed(tmp_path / "run", "0"))[1]
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    for label in tiny.TOPICS:  # scored as it predicts, whatever labels the file happens to hold
        other = tmp_path / f"{label}.jsonl"
        asked = [row for row in rows if row["label"] == label]
        other.write_text("".join(json.dumps(row) + "\n" for row in asked))
        if label in about.own_labels:
            answers = predict(tmp_path / "run", [row["text"] for row in asked], client="0")
            hits = sum(answer.label == label for answer in answers)
            assert evaluate(tmp_path / "run", other, client="0")["accuracy"] == pytest.approx(hits / len(asked))
        else:
            with pytest.raises(UserError, match=f"'{label}' is none of client '0'"):
                evaluate(tmp_path / "run", other, client="0")
    said = run(file, tmp_path / "said", "training.rounds=1", 'adapter.extras.head="share"')
    assert said["global"] is not None


@pytest.mark.parametrize("name", ["ditto", "fdlora", "feddpa"])
def test_a_variant_called_global_is_no_global_score_where_heads_are_private(tmp_path: Path, name: str) -> None:
    file = tiny.run_file(tmp_path, adapter='extras = {head = "private"}\n', training="rounds = 1\nsteps = 1\n")
    summary = run(file, tmp_path / "run", f"algorithm.name={name}")
    assert "global" in summary["personal"]["variants"]
    assert summary["global"] is None


@pytest.mark.parametrize("algorithm", ["fedit", "pooled"])
def test_a_run_on_texts_that_are_tokenised_when_needed_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    training = "rounds = 2\nclients_per_round = 2\nepochs = 1\nbatch_size = 4\n"
    file = tiny.run_file(tmp_path, training=training, data="partition = {clients = 5}\n")
    runs: list[fedlora.Result] = []
    for many in (10**6, 1):
        monkeypatch.setattr("fedlora.learning.tasks.MANY", many)
        runs.append(fedlora.run(load(file, [f"algorithm.name={algorithm}"]), out=tmp_path / str(many)))
    for known, later in zip(*(one.history for one in runs), strict=True):
        timeless = known.keys() - {"seconds", "client_steps_per_second"}
        assert {key: later[key] for key in timeless} == {key: known[key] for key in timeless}
    known, later = (one.summary for one in runs)
    assert later["personal"] == known["personal"]
    assert later["data_hash"] == known["data_hash"]


def test_pooled_is_marked_and_beats_chance(tmp_path: Path) -> None:
    file = tiny.run_file(
        tmp_path, training="rounds = 3\nepochs = 3\nbatch_size = 8\n", data="partition = {clients = 4}\n"
    )
    summary = run(file, tmp_path / "run", "algorithm.name=pooled", "training.eval_every=0")
    assert summary["federated"] is False
    assert summary["clients"] == len(summary["personal"]["per_client"]) == 4
    assert summary["personal"]["mean"] > 0.6


def test_head_only_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="labels"):
        run(instructions(tmp_path), tmp_path / "run", "algorithm.name=head-only")


def test_norms_may_train(tmp_path: Path) -> None:
    file = tiny.run_file(tmp_path, adapter='extras = {norm = "share"}\n', training="rounds = 1\n")
    run(file, tmp_path / "run")
    described = json.loads((tmp_path / "run" / "adapters" / "global" / "adapter_config.json").read_text())
    assert any("LayerNorm" in name for name in described["modules_to_save"])


def long_texts(folder: Path) -> Path:
    """Texts of 80 words for models with places for 64 tokens."""
    file = tiny.run_file(folder, training="rounds = 1\nsteps = 1\n", data="partition = {clients = 2}\n")
    rows = [json.loads(line) for line in (folder / "mine.jsonl").read_text().splitlines()[:40]]
    for row in rows:
        row["text"] = " ".join((row["text"].split() * 80)[:80])
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 16, "max_position_embeddings": 64}


def test_texts_longer_than_a_model_has_places_for(tmp_path: Path) -> None:
    file = long_texts(tmp_path)
    assert run(file, tmp_path / "cut")["rounds"] == 1
    with pytest.raises(UserError, match=r"max_length = 70: .* has places for 64 tokens\n  -> set it to at most 64"):
        run(file, tmp_path / "run", "data.max_length=70")
    roberta = transformers.RobertaConfig(**SIZES, pad_token_id=0)  # the first place is the padding token's
    tiny._saved(transformers.RobertaModel, roberta, tmp_path / "roberta")
    assert run(file, tmp_path / "roberta-cut", f"model.name={tmp_path / 'roberta'}")["rounds"] == 1
    with pytest.raises(UserError, match="has places for 63 tokens"):
        run(file, tmp_path / "run", f"model.name={tmp_path / 'roberta'}", "data.max_length=64")
    computed = transformers.LlamaConfig(**SIZES, pad_token_id=0)  # rotary: any length
    tiny._saved(transformers.LlamaModel, computed, tmp_path / "llama")
    assert run(file, tmp_path / "llama-run", f"model.name={tmp_path / 'llama'}", "data.max_length=80")["rounds"] == 1
    endless = transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16)  # says -1 places
    assert endless.max_position_embeddings == -1
    private = load_backbone(transformers.XLNetModel(endless), "text-classification", labels=("a", "b"), adapt=False)
    assert max_length(load(file), private) == 128


@pytest.mark.parametrize("kind", ["CTRL", "CodeGen", "GPTJ", "OpenAIGPT"])
def test_models_whose_places_are_computed_beforehand_have_an_end(tmp_path: Path, kind: str) -> None:
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    own = {"CTRL": {"dff": 16}, "CodeGen": {"rotary_dim": 4, "n_head": 4}, "GPTJ": {"rotary_dim": 4}}.get(kind, {})
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **own})
    name = f"{kind}ForCausalLM" if kind in ("CodeGen", "GPTJ") else f"{kind}LMHeadModel"
    base = load_backbone(getattr(transformers, name)(config), "causal-lm")
    file = instructions(tmp_path)
    assert max_length(load(file), base) == 64
    with pytest.raises(UserError, match=r"max_length = 65: .* has places for 64 tokens"):
        max_length(load(file, ["data.max_length=65"]), base)
