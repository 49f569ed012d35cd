"""Which layers are adapted, by default and by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from fedlora.adapters.inject import AUTO, candidates, embeddings, inject, norms, remove, select
from fedlora.adapters.lora import LaneLinear
from fedlora.errors import UserError
from fedlora.learning.pooled import PooledClassifier, PooledConfig

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=30, **SMALL))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=30, num_key_value_heads=1, **SMALL))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=3, n_head=2))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))


def pooled() -> nn.Module:
    encoder = bert()
    return PooledClassifier(PooledConfig(encoder.config, "mean", num_labels=3), encoder)


def ends(model: nn.Module, **options) -> dict[str, int]:
    """How often each last name is chosen."""
    found: dict[str, int] = {}
    for path in select(model, **options):
        name = path.rsplit(".", 1)[-1]
        found[name] = found.get(name, 0) + 1
    return found


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (bert, {"query": 3, "value": 3}),
        (pooled, {"query": 3, "value": 3}),
        (llama, dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 3)),
        (gpt2, {"c_attn": 3, "c_proj": 6, "c_fc": 3}),
    ],
)
def test_auto(make, wanted):
    assert ends(make()) == wanted


def test_auto_for_images_takes_query_and_value_whatever_this_version_calls_them():
    chosen = select(vit())
    assert len(chosen) == 6
    assert {path.split(".")[-1][0] for path in chosen} == {"q", "v"}


def test_an_unknown_architecture_takes_every_linear_layer_but_the_head():
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))
    model.head = nn.Linear(6, 2)
    assert sorted(select(model)) == ["body.0", "body.2"]
    model.fc = nn.Linear(2, 2)
    assert "fc" not in select(model, head="fc")


def test_the_head_is_never_adapted():
    assert "lm_head" not in candidates(llama())
    assert not any(path.startswith(("head", "classifier")) for path in (*candidates(pooled()), *candidates(vit())))
    with pytest.raises(UserError, match="lm_head"):
        select(llama(), "lm_head")


def test_patterns_and_layers():
    model = bert()
    assert ends(model, targets=("key", "intermediate.dense")) == {"key": 3, "dense": 3}
    assert list(select(model, "*.1.*query")) == ["encoder.layer.1.attention.self.query"]
    assert len(select(model, r".*layer\.[01]\..*(query|key)")) == 4
    assert {path.split(".")[2] for path in select(model, layers=[0, -1])} == {"0", "2"}


def test_errors_list_what_there_is():
    with pytest.raises(UserError, match=r"'qurey' matches no linear layer of this BertModel") as caught:
        select(bert(), ["query", "qurey"])
    assert "dense, key, query, value" in str(caught.value)
    with pytest.raises(UserError, match=r"block 7.*\n.*\[0, 1, 2\]"):
        select(bert(), layers=[0, 7])


@pytest.mark.parametrize("make", [bert, gpt2, vit])
def test_injection_changes_nothing_until_there_is_a_plan_and_is_undone(make):
    model = make().eval()
    before = dict(model.named_modules())
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)} if make is vit else {"input_ids": torch.arange(10).view(2, 5)}
    with torch.no_grad():
        plain = model(**inputs)[0]
        sites = inject(model, select(model))
        assert all(isinstance(model.get_submodule(path), LaneLinear) for path in sites)
        assert torch.equal(model(**inputs)[0], plain)
    remove(model)
    assert dict(model.named_modules()) == before


def test_norms_and_embeddings():
    model = llama()
    assert len(norms(model)) == 2 * 3 + 1
    assert set(embeddings(model)) == {"model.embed_tokens.weight"}
    assert len(norms(bert())) == 2 * (2 * 3 + 1)


def test_every_listed_architecture_says_something():
    assert all(patterns and all(patterns) for patterns in AUTO.values())
