"""Bases in 4 bits: trained on, resumed, exported and loaded by PEFT; what cannot be is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import fedlora
from fedlora.errors import UserError
from fedlora.learning.loading import load_backbone
from study import tiny

ADAPTER = "adapters/global/adapter_model.safetensors"
TEXTS = ["a saw near the old fig", "some lime", "one drill takes the axe"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # in PEFT
]


def four_bits(folder: Path, **sections: str) -> Path:
    """A run file on a base in 4 bits whose sizes are multiples of NF4's blocks."""
    file = tiny.run_file(folder, **sections)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_labels=2
    )
    tiny._saved(transformers.BertForSequenceClassification, config, folder / "headed")
    file.write_text(file.read_text().replace('name = "model"\n', 'name = "headed"\nbits = 4\n'))
    return file


def test_layers_are_packed_and_heads_are_not(tmp_path: Path) -> None:
    four_bits(tmp_path)
    base = load_backbone(tmp_path / "headed", "text-classification", labels=("fruit", "tools"), bits=4)
    assert all(type(site.base) is bitsandbytes.nn.Linear4bit for site in base.sites.values())
    assert base.head is not None
    assert type(base.head) is nn.Linear
    assert base.head.weight.dtype == torch.float32
    whole = load_backbone(tmp_path / "headed", "text-classification", labels=("fruit", "tools"))
    ids = torch.arange(5, 29).view(4, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    near, exact = (one.forward(inputs)[0] for one in (base, whole))
    assert 1e-3 < float((near - exact).norm() / exact.norm()) < 0.5
    assert base.fingerprint != whole.fingerprint


def test_what_a_checkpoint_lacks_is_not_packed(tmp_path: Path) -> None:
    """A masked language model has no pooler, and the encoder's starts at random."""
    config = transformers.RobertaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, pad_token_id=1
    )
    tiny._saved(transformers.RobertaForMaskedLM, config, tmp_path / "masked")
    base = load_backbone(tmp_path / "masked", "text-classification", labels=("fruit", "tools"), bits=4)
    assert all(type(site.base) is bitsandbytes.nn.Linear4bit for site in base.sites.values())
    ids = torch.arange(5, 29).view(4, 6)
    assert bool(base.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0].isfinite().all())


def test_gradients_are_those_of_the_unpacked_weights(tmp_path: Path) -> None:
    """Dequantised weights in a plain base give the same adapter, to float32's rounding: lanes, scoring in between."""
    plain = fedlora.run(four_bits(tmp_path, training="rounds = 2\nsteps = 4\nlr = 0.01\n"), out=tmp_path / "packed")
    packed = load_backbone(tmp_path / "headed", "text-classification", labels=("fruit", "tools"), bits=4)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "headed")
    for name, layer in packed.plain().named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = layer.weight.quant_state
            model.get_submodule(name).weight.data = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    model.save_pretrained(tmp_path / "headed")
    file = tmp_path / "my.toml"
    file.write_text(file.read_text().replace("bits = 4\n", ""))
    unpacked = fedlora.run(file, out=tmp_path / "unpacked")
    one, other = (load_file(tmp_path / run / ADAPTER) for run in ("packed", "unpacked"))
    moved = max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name)
    assert moved > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)
    assert plain.summary["personal"]["mean"] == pytest.approx(unpacked.summary["personal"]["mean"], abs=0.02)


def test_a_run_resumes_is_exported_and_loads_in_peft(tmp_path: Path) -> None:
    file = four_bits(tmp_path, training="rounds = 2\nsteps = 4\nlr = 0.01\n")
    fedlora.run(file, out=tmp_path / "whole")
    fedlora.run(file, out=tmp_path / "cut", training={"rounds": 1})
    fedlora.resume(tmp_path / "cut", rounds=2)
    assert (tmp_path / "cut" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()

    folder = fedlora.export(tmp_path / "whole", tmp_path / "adapter")
    answers = fedlora.predict(folder, TEXTS)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "BitsAndBytesConfig" in code
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(folder)), names)
    for layer in names["model"].modules():  # the library's own order of weights for some CPUs rounds to bfloat16
        vars(layer)["support_avx512bf16_for_cpu"] = False
    encoded = tiny.tokenizer()(TEXTS, padding=True, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = names["model"](**inputs).logits.softmax(-1)
    labels = sorted(answers[0].probabilities)
    wanted = torch.tensor([[answer.probabilities[label] for label in labels] for answer in answers])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="is a Linear4bit"):
        fedlora.export(tmp_path / "whole", tmp_path / "merged", merge=True)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": 'dtype = "float64"\n'}, "float32 or bfloat16"),
        ({"adapter.extras": 'backbone = "share"\n'}, "is not trained"),
        ({"clients": 'models = ["model"]\n'}, "is not trained"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, sections: dict[str, str], said: str) -> None:
    file = four_bits(tmp_path, **sections)
    file.write_text(file.read_text().replace('dtype = "float32"\ndtype', "dtype"))
    with pytest.raises(UserError, match=said):
        fedlora.run(file, out=tmp_path / "out")


def test_without_the_library_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = four_bits(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"bits = 4(.|\n)*fedlora\[four-bit\]"):
        fedlora.run(file, out=tmp_path / "out")
