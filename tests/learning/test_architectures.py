"""Kinds of models: what each says through this library is what it says itself, or it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from fedlora.errors import UserError
from fedlora.federation.orders import Features, Fit, Model
from fedlora.learning.examples import Examples
from fedlora.learning.loading import load_backbone
from fedlora.learning.tasks import CausalLM, ImageClassification
from learning.test_backbone import IDS, MASK, TEXT, features
from learning.test_packing import outcome
from learning.worlds import LABELS, VOCAB, adapter, bert, distance, examples, learner, run, seeded, splits

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24, "num_labels": 3}
TEXTS = {"vocab_size": VOCAB, "pad_token_id": 0}


GROUPED: dict[str, Any] = {**TEXTS, **SMALL, "num_key_value_heads": 1, "max_position_embeddings": 64}


def text_models() -> dict[str, nn.Module]:
    t = transformers
    gpt2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "num_labels": 3, "pad_token_id": 0}
    distil = {"vocab_size": VOCAB, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "num_labels": 3}
    llama = {**TEXTS, **SMALL, "num_key_value_heads": 1}
    return {
        "roberta": t.RobertaForSequenceClassification(t.RobertaConfig(**TEXTS, **SMALL, max_position_embeddings=40)),
        "distilbert": t.DistilBertForSequenceClassification(t.DistilBertConfig(**distil)),
        "llama": t.LlamaForSequenceClassification(t.LlamaConfig(**llama)),
        "qwen2": t.Qwen2ForSequenceClassification(t.Qwen2Config(**llama)),
        "gpt2": t.GPT2ForSequenceClassification(t.GPT2Config(**gpt2)),
    }


def image_models() -> dict[str, nn.Module]:
    t = transformers
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    return {
        "vit": t.ViTForImageClassification(t.ViTConfig(**SMALL, image_size=8, patch_size=4)),
        "resnet": t.ResNetForImageClassification(t.ResNetConfig(**resnet)),
        "clip": t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)),
    }


@pytest.mark.parametrize("name", ["roberta", "distilbert", "llama", "qwen2", "gpt2"])
def test_text_classifiers_say_what_they_said_through_their_own_head(name):
    module = seeded(lambda: text_models()[name])
    base = load_backbone(module, TEXT, labels=LABELS)
    with torch.no_grad():
        wanted = module(input_ids=IDS, attention_mask=MASK).logits
    start = base.spec(2).start(0)
    found = torch.nn.functional.linear(features(base), start["head/weight"], start.get("head/bias"))
    torch.testing.assert_close(found, wanted)
    assert base.sites


@pytest.mark.parametrize("name", ["vit", "resnet", "clip"])
def test_image_classifiers_and_encoders(name):
    module = seeded(lambda: image_models()[name])
    base = load_backbone(module, "image-classification", labels=LABELS, adapt=name != "resnet")
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found, _ = base.forward({"pixel_values": pixels})
        start = base.spec(2).start(0)
        if name == "clip":
            wanted, found = module(pixel_values=pixels).pooler_output, found
        else:
            wanted = module(pixel_values=pixels).logits
            found = torch.nn.functional.linear(found, start["head/weight"], start["head/bias"])
    torch.testing.assert_close(found, wanted)


def test_models_that_no_task_suits_are_refused(tmp_path):
    t5 = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    for i, two in enumerate((transformers.T5Model(t5), transformers.T5EncoderModel(t5))):
        two.save_pretrained(tmp_path / str(i))
        with pytest.raises(UserError, match="t5 is an encoder-decoder model"):
            load_backbone(tmp_path / str(i), TEXT, labels=LABELS, processor=object())
    with pytest.raises(UserError, match="t5 is an encoder-decoder model"):
        load_backbone(transformers.T5Model(t5), TEXT, labels=LABELS)
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = transformers.BartConfig(vocab_size=VOCAB, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **small)
    transformers.BartForConditionalGeneration(bart).save_pretrained(tmp_path / "bart")
    with pytest.raises(UserError, match="bart is an encoder-decoder model"):  # its decoder alone would load
        load_backbone(tmp_path / "bart", "causal-lm", processor=object())
    load_backbone(transformers.BartForCausalLM(bart), "causal-lm")
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"bert is an encoder[\s\S]*is_decoder = true"):
        load_backbone(tmp_path / "bert", "causal-lm", processor=object())
    one_way = transformers.BertConfig(**{**bert().config.to_dict(), "is_decoder": True})
    load_backbone(transformers.BertLMHeadModel(one_way), "causal-lm")


MIXING: dict[str, dict[str, Any]] = {
    "Canine": {"downsampling_rate": 4},
    "ConvBert": {"embedding_size": 16},
    "FNet": {},
    "Longformer": {"attention_window": [8, 8]},
    "MobileBert": {"embedding_size": 16, "intra_bottleneck_size": 16},
    "Nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8},
    "XLNet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
    "Yoso": {},
}


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_texts_are_refused_or_warned_of(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Refused where lanes would meet each other's tokens, warned of where only padding changes what they say."""
    sizes = {"vocab_size": VOCAB} if name == "XLNet" else {**TEXTS, **SMALL}
    module = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes, **MIXING[name]))
    if name in ("Longformer", "XLNet"):
        with pytest.raises(UserError, match="its layers see tokens before examples"):
            load_backbone(module, TEXT, labels=LABELS)
    else:
        for adapt in (True, False):  # a base, and a client's own
            caplog.clear()
            load_backbone(module, TEXT, labels=LABELS, adapt=adapt)
            assert f"tokens of {name.lower()} see padding" in caplog.text


# -- what is read of a configuration


def test_a_decoder_that_is_not_causal_sees_whole_texts() -> None:
    config = transformers.LlamaConfig(**GROUPED)
    config.is_causal = False  # transformers then makes no causal mask
    module = seeded(lambda: transformers.LlamaModel(config))
    base = load_backbone(module, TEXT, labels=LABELS)
    assert base.packs(IDS.shape[1])
    assert base.module.config.pooling == "mean"
    with torch.no_grad():
        hidden = module(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(features(base), torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)]))
    with pytest.raises(UserError, match=r"is_causal = false[\s\S]*take is_causal out"):
        load_backbone(transformers.LlamaForCausalLM(config), "causal-lm")


@pytest.mark.parametrize("alibi", [True, False])
def test_short_texts_meet_the_attention_that_was_loaded(alibi: bool) -> None:
    """Falcon's own products add ALiBi twice, its SDPA does not."""
    config = transformers.FalconConfig(**TEXTS, **SMALL, alibi=alibi, multi_query=False)
    module = seeded(lambda: transformers.FalconForCausalLM(config))
    base = load_backbone(module, "causal-lm")
    assert base.switching is not alibi
    with torch.no_grad():
        wanted = module(input_ids=IDS, attention_mask=MASK).logits
        found = base.forward({"input_ids": IDS, "attention_mask": MASK})[1]
    torch.testing.assert_close(found[MASK.bool()], wanted[MASK.bool()])


@pytest.mark.parametrize("kind", ["Mistral", "ModernBert"])
def test_windows_beyond_the_end_of_a_text_are_numbers_in_float64(kind: str) -> None:
    """A row of padding sees padding alone."""
    window = {"local_attention": 12} if kind == "ModernBert" else {"sliding_window": 6, "num_key_value_heads": 1}
    config = getattr(transformers, f"{kind}Config")(**TEXTS, **SMALL, **window, max_position_embeddings=64)
    module = seeded(lambda: getattr(transformers, f"{kind}Model")(config))
    exact, single = (load_backbone(module, TEXT, labels=LABELS, dtype=d) for d in (torch.float64, torch.float32))
    assert not exact.packs(30)
    values, grads = outcome(exact, True)
    assert all(bool(value.isfinite().all()) for value in (values, *grads))
    torch.testing.assert_close(values.float(), outcome(single, True)[0], rtol=1e-3, atol=1e-3)


def test_the_last_token_of_a_longer_batch_in_bfloat16_is_the_texts_own() -> None:
    """Batches of few shapes grow by the token that stands for padding: BLOOM's is 3."""
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2, num_labels=3)
    config.pad_token_id = 3
    module = seeded(lambda: transformers.BloomForSequenceClassification(config))
    lengths = np.array([40, 21, 21, 21])
    offsets = np.concatenate([[0], lengths.cumsum()])
    tokens = np.random.default_rng(0).integers(4, VOCAB, offsets[-1]).astype(np.int32)
    store = Examples(lengths, np.zeros(4, dtype=np.int64), np.arange(5), tokens, offsets, pad=3)
    base = load_backbone(module, TEXT, labels=LABELS, dtype=torch.bfloat16)
    executor = learner(base, examples=store, spec=base.spec(2))
    executor.splits = {"c0": {"fit": np.arange(1, 4)}}
    found, _ = run(executor, {"c0": Features(Model({}), "fit")})["c0"]
    with torch.no_grad():
        ids = torch.from_numpy(tokens[40:].reshape(3, 21)).long()
        wanted = module.bfloat16().transformer(input_ids=ids).last_hidden_state[:, -1].float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


# -- what "auto" adapts


RELATIVE = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
ADAPTED: dict[str, set[str]] = {
    "deberta": {"in_proj"},
    "deberta-v2": {"query_proj", "value_proj"},
    "deberta-v3": {"value_proj"},
    "llama4": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phimoe": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "swinv2": {"query", "value"},
}


def adapted(kind: str) -> nn.Module:
    t = transformers
    if kind == "deberta":
        return t.DebertaModel(t.DebertaConfig(**TEXTS, **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]))
    if kind.startswith("deberta"):
        shared = kind == "deberta-v3"  # as its checkpoints have it
        return t.DebertaV2Model(t.DebertaV2Config(**TEXTS, **SMALL, **RELATIVE, share_att_key=shared))
    if kind == "llama4":
        sizes = {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 24}
        return t.Llama4ForCausalLM(t.Llama4TextConfig(**GROUPED, **sizes))
    if kind == "phimoe":
        return t.PhimoeForCausalLM(t.PhimoeConfig(**GROUPED, num_local_experts=2))
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    return t.Swinv2ForImageClassification(t.Swinv2Config(**sizes, window_size=4, num_labels=3))


@pytest.mark.parametrize("kind", ADAPTED)
def test_what_is_adapted_by_default_trains(kind: str) -> None:
    """Neither tables of positions, which are no example's, nor routers, which return a choice."""
    module = seeded(lambda: adapted(kind))
    task = "image-classification" if kind == "swinv2" else "causal-lm" if ADAPTED[kind] & {"k_proj"} else TEXT
    base = load_backbone(module, task, labels=() if task == "causal-lm" else LABELS)
    assert {site.rsplit(".", 1)[1] for site in base.sites} == ADAPTED[kind]
    count = splits(6)[1]
    options: dict[str, Any] = {"spec": base.spec(4)}
    if task == "causal-lm":
        options |= {"task": CausalLM(), "examples": examples(count, causal=True)}
    elif kind == "swinv2":
        pixels = np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)
        prepare = {"pixels": pixels, "prepare": lambda x: x.permute(0, 3, 1, 2).float() / 255}
        store = Examples(np.full(count, 64), np.zeros(count, dtype=np.int64), np.arange(count + 1), **prepare)
        options |= {"task": ImageClassification(LABELS), "examples": store}
    starts = {f"c{k}": adapter(options["spec"], 2, seed=k) for k in range(2)}
    train = ("A", "B", *(() if task == "causal-lm" else ("head",)))
    both = [
        run(learner(base, lanes, **options), {c: Fit(Model(tree), train, steps=2) for c, tree in starts.items()})
        for lanes in (1, 2)
    ]
    for client, start in starts.items():
        alone, beside = (fits[client].params for fits in both)
        assert distance(alone, beside) < 1e-3 < distance(alone, start)
