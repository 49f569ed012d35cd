"""Any Hugging Face model: tiny random ones of many families learn 16 examples, are exported, reloaded and agree."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import fedlora
from fedlora.assets import embedded_lm
from fedlora.cli import app
from study import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # in PEFT
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # PEFT's hint
]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
TOKENS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
BYTES: dict[str, Any] = {"vocab_size": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 1, "head_dim": 16}
GPT2: dict[str, Any] = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
DECODERS: dict[str, Any] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED)),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**GROUPED, sliding_window=32)),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**{**SIZES, "hidden_size": 128}, **BYTES, num_key_value_heads=1)),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**GROUPED)),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig(**GROUPED)),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**GROUPED, sliding_window=32)),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2)),
}
ENCODERS: dict[str, Any] = {
    "bert": (hf.BertModel, hf.BertConfig(**SIZES, **TOKENS)),
    "roberta": (hf.RobertaModel, hf.RobertaConfig(**SIZES, **TOKENS)),
    "distilbert": (
        hf.DistilBertModel,
        hf.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=48),
    ),
    "llama": (hf.LlamaModel, hf.LlamaConfig(**GROUPED)),
}
VISION: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 8}
IMAGES: dict[str, Any] = {
    "vit": (hf.ViTModel, hf.ViTConfig(**{k: v for k, v in VISION.items() if k != "max_position_embeddings"})),
    "clip": (
        hf.CLIPModel,
        hf.CLIPConfig(text_config={**SIZES, **TOKENS}, vision_config=VISION, projection_dim=16),
    ),
}
LABELS = sorted(tiny.TOPICS)


def fed(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def saved(folder: Path, family: tuple[Any, Any]) -> None:
    """A random model with activations of order one, and what reads its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = family[0](family[1])
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
        model.save_pretrained(folder)


def run_file(folder: Path, task: str, data: str) -> Path:
    file = folder / "my.toml"
    file.write_text(
        f'[model]\nname = "model"\ntask = "{task}"\ndtype = "float32"\n[adapter]\nrank = 8\n'
        f'[data]\ntrain = "mine.jsonl"\ntest = "mine.jsonl"\n{data}partition = {{clients = 2}}\n'
        '[algorithm]\nname = "fedit"\n'
        '[training]\nrounds = 16\nepochs = 6\nbatch_size = 4\nlr = 0.01\nschedule = "linear"\neval_every = 100\n'
    )
    return file


def trained(folder: Path, file: Path) -> tuple[dict[str, Any], list[Any]]:
    """The whole command line: data, run, export as adapter and merged."""
    assert "16" in fed("data", file)
    fed("run", file, "--out", folder / "run")
    fed("export", folder / "run", "--to", folder / "adapter")
    fed("export", folder / "run", "--merge", "--to", folder / "merged")
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return summary, [by_its_card(folder / name) for name in ("adapter", "merged")]


def by_its_card(folder: Path) -> Any:
    """The model that the lines of the card in an export load: PEFT's or transformers' own."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("THIS_FOLDER", str(folder)), names)
    return names["model"].eval()


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_language_models(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "model", DECODERS[name])
    own = name == "qwen2"  # transformers reads every Qwen2 folder with a tokenizer of bytes
    tokenizer = hf.AutoTokenizer.from_pretrained(embedded_lm()) if own else tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    rng = random.Random(0)
    answers: dict[str, str] = {}
    while len(answers) < 16:
        topic = LABELS[len(answers) % len(LABELS)]
        answers[tiny.sentence(rng, topic) + " ?"] = " ".join(rng.sample(tiny.TOPICS[topic], 2))
    rows = [{"question": question, "answer": answer} for question, answer in answers.items()]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = run_file(tmp_path, "causal-lm", 'prompt = "question"\nresponse = "answer"\n')
    summary, (adapted, merged) = trained(tmp_path, file)
    before = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["global"]
    assert summary["global"]["score"] < 0.25 * before  # the sixteen answers are known
    ids = torch.randint(4, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    said = fedlora.predict(tmp_path / "run", list(answers))
    assert sum(right == answer for right, answer in zip(answers.values(), said, strict=True)) >= 15
    assert fedlora.predict(tmp_path / "adapter", list(answers)) == said


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_text_classifiers(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "model", ENCODERS[name])
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rng = random.Random(1)
    texts: dict[str, str] = {}
    while len(texts) < 16:
        texts[tiny.sentence(rng, rng.choice(LABELS))] = LABELS[len(texts) % len(LABELS)]  # to be learnt by heart
    rows = [{"text": text, "label": label} for text, label in texts.items()]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = run_file(tmp_path, "text-classification", 'text = "text"\nlabel = "label"\n')
    summary, models = trained(tmp_path, file)
    assert summary["global"]["score"] == 1.0
    said = fedlora.predict(tmp_path / "run", list(texts))
    wanted = torch.tensor([[answer.probabilities[label] for label in LABELS] for answer in said])
    inputs = tiny.tokenizer()(list(texts), padding=True, return_tensors="pt")
    for model in models:
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        torch.testing.assert_close(logits.softmax(-1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_image_classifiers(name: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    saved(tmp_path / "model", IMAGES[name])
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "do_resize": True}
    settings |= {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (16, 16, 16, 3), dtype=np.uint8)
    rows: list[dict[str, str]] = []
    for i, picture in enumerate(pixels):
        image.fromarray(picture).save(tmp_path / f"{i}.png")
        rows.append({"image": str(tmp_path / f"{i}.png"), "label": LABELS[i % len(LABELS)]})
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = run_file(tmp_path, "image-classification", 'image = "image"\nlabel = "label"\n')
    summary, models = trained(tmp_path, file)
    assert summary["global"]["score"] == 1.0
    said = fedlora.predict(tmp_path / "run", [row["image"] for row in rows])
    wanted = torch.tensor([[answer.probabilities[label] for label in LABELS] for answer in said])
    inputs = (torch.tensor(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    for model in models:
        with torch.no_grad():
            torch.testing.assert_close(model(pixel_values=inputs).logits.softmax(-1), wanted, rtol=1e-4, atol=1e-5)
