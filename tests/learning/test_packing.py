"""Sequences without padding: the same numbers as with it, nothing from one sequence to another, hardly any padding."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters.lora import Dropout, Factors, Plan
from fedlora.federation.orders import Fit, Model, Optimizer, Score
from fedlora.learning import blockwise
from fedlora.learning import packing as packed
from fedlora.learning.backbone import LONG, Backbone
from fedlora.learning.batches import evenly
from fedlora.learning.blockwise import BIN, BLOCK, Blocks, blocks_of, partition, rooms
from fedlora.learning.fitting import Diverged
from fedlora.learning.loading import load_backbone
from fedlora.learning.packing import packable, packed_sizes, packing
from learning.test_batches import texts
from learning.worlds import LABELS, VOCAB, adapter, backbone, bert, distance, learner, run, seeded, spec_of

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
LENGTHS = (5, 30, 7, 1, 12, 28, 28, 3)


def roberta() -> torch.nn.Module:
    config = transformers.RobertaConfig(**SIZES)
    return seeded(lambda: transformers.RobertaModel(config, add_pooling_layer=False))


def qwen() -> torch.nn.Module:
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2)
    return seeded(lambda: transformers.Qwen2ForCausalLM(config))


GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
WIDER: dict[str, Any] = {**SIZES, "hidden_size": 32}  # half of each head turns
OTHERS: dict[str, dict[str, Any]] = {
    "BioGptModel": SIZES,
    "CamembertModel": SIZES,
    "CohereModel": GROUPED,
    "Data2VecTextModel": SIZES,
    "DistilBertModel": {
        "vocab_size": VOCAB, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
    "ElectraModel": {**SIZES, "embedding_size": 24},
    "EuroBertModel": GROUPED,
    "GPT2Model": {
        "vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "GPTNeoXModel": SIZES,
    "Gemma3TextModel": {**GROUPED, "head_dim": 8, "sliding_window": 30},
    "GemmaModel": {**GROUPED, "head_dim": 8},
    "GlmModel": {**GROUPED, "head_dim": 8},
    "GraniteModel": {**GROUPED, "attention_multiplier": 0.3},
    "HeliumModel": {**GROUPED, "head_dim": 6},
    "MistralModel": {**GROUPED, "sliding_window": 30},
    "ModernBertModel": {**SIZES, "local_attention": 60},
    "NomicBertModel": SIZES,
    "OPTModel": {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 24},
    "Olmo2Model": GROUPED,
    "OlmoModel": GROUPED,
    "PersimmonModel": WIDER,
    "Phi3Model": {**GROUPED, "sliding_window": 30},
    "PhiModel": WIDER,
    "Qwen3Model": GROUPED,
    "SmolLM3Model": GROUPED,
    "Starcoder2Model": {**GROUPED, "sliding_window": 30},
}  # fmt: skip
"""Further models, by what their configurations are given."""


def other(model: str) -> torch.nn.Module:
    config = getattr(transformers, model.replace("Model", "Config"))(**OTHERS[model])
    return seeded(lambda: getattr(transformers, model)(config))


def known(kind: str, dtype: torch.dtype = torch.float64) -> Backbone:
    if kind == "roberta":
        return load_backbone(roberta(), "text-classification", labels=LABELS, dtype=dtype)
    if kind == "qwen2":
        return load_backbone(qwen(), "causal-lm", dtype=dtype)
    return backbone(kind, dtype)


def batch() -> dict[str, torch.Tensor]:
    longest = max(LENGTHS)
    mask = (torch.arange(longest) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(3, VOCAB, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids * mask, "attention_mask": mask}


def gated(base: Backbone) -> tuple[Plan, list[torch.Tensor]]:
    """Two adapters, the second with a weight per row, three lanes, dropout; and what is trained."""
    draw = torch.Generator().manual_seed(1)
    kind = next(base.module.parameters()).dtype
    wide = torch.float64 if kind == torch.float64 else torch.float32
    leaves: list[torch.Tensor] = []
    slots: dict[str, tuple[Factors, ...]] = {}
    for site, layer in base.sites.items():
        found: list[Factors] = []
        for gate in (None, torch.rand(len(LENGTHS), generator=draw).to(wide)):
            a, b = (
                torch.randn(3, 2, layer.in_features, generator=draw),
                torch.randn(3, layer.out_features, 2, generator=draw),
            )
            pair = [(0.3 * value).to(wide).requires_grad_() for value in (a, b)]
            leaves += pair
            found.append(Factors(*pair, None, (1.0, 0.5, 0.7), gate))
        slots[site] = tuple(found)
    dropout = Dropout(0.2, torch.arange(len(LENGTHS)))
    return Plan(((0, 0, 3), (1, 3, 4), (2, 4, 8)), slots, dropout=dropout), leaves


def outcome(base: Backbone, unpadded: bool, together: bool = False) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Features (and logits of real tokens), and the gradients of what is trained."""
    base.unpadded = unpadded
    plan, leaves = gated(base)
    inputs = batch()
    features, logits = base.forward(inputs, plan, together=together)
    parts = [features.flatten()] + ([] if logits is None else [logits[inputs["attention_mask"].bool()].flatten()])
    out = torch.cat(parts).to(leaves[0].dtype)
    return out.detach(), torch.autograd.grad(out.square().sum(), leaves)


def apart(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "qwen2"])
def test_packed_sequences_give_the_numbers_of_padded_ones(kind: str, together: bool) -> None:
    base = known(kind)
    assert base.packs(max(LENGTHS))
    packed, wanted = outcome(base, True, together), outcome(base, False)
    assert apart((packed[0], *packed[1]), (wanted[0], *wanted[1])) < 1e-11


@pytest.mark.parametrize("model", OTHERS)
def test_further_models_are_packed_to_the_numbers_of_padded_ones(model: str) -> None:
    base = load_backbone(other(model), "text-classification", labels=LABELS, dtype=torch.float64)
    assert base.packs(max(LENGTHS))
    packed = outcome(base, True)
    wanted = outcome(base, False)
    assert apart((packed[0], *packed[1]), (wanted[0], *wanted[1])) < 1e-8  # rounding, which small gradients enlarge


@pytest.mark.parametrize("model", ["Gemma3TextModel", "MistralModel", "ModernBertModel", "Phi3Model"])
def test_sequences_longer_than_a_window_are_padded(model: str) -> None:
    base = load_backbone(other(model), "text-classification", labels=LABELS, dtype=torch.float64)
    assert base.packs(30)
    assert not base.packs(31)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_bfloat16_is_as_near_to_the_exact_numbers_as_with_padding(kind: str) -> None:
    exact = outcome(known(kind), False)
    packed, padded = (outcome(known(kind, torch.bfloat16), unpadded, unpadded) for unpadded in (True, False))
    near, far = ((x[0].double() - exact[0]).norm() / exact[0].norm() for x in (packed, padded))
    assert near < 1.3 * far < 0.1
    assert apart(packed[1], exact[1]) < 1.5 * apart(padded[1], exact[1])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_rows_that_sequences_share_have_room_for_them(lengths: list[int]) -> None:
    sizes = np.array(lengths)
    found = rooms(sizes, torch.bfloat16, together=True)
    assert sorted(np.concatenate([room.sequences for room in found]).tolist()) == list(range(len(lengths)))
    for room in found:
        taken = np.zeros(room.shape, dtype=int)
        for sequence, row, offset in zip(room.sequences, room.row, room.offset):
            assert offset + sizes[sequence] <= room.shape[1]
            taken[row, offset : offset + sizes[sequence]] += 1
        assert taken.max() == 1
    apart = rooms(sizes, torch.bfloat16)
    assert len(found) <= len(apart)
    assert not any(room.shared for room in [*apart, *rooms(sizes, torch.float32, together=True)])
    mask = (torch.arange(sizes.max()) < torch.tensor(lengths)[:, None]).long()
    made = packing(mask, 2, torch.bfloat16, together=True)
    assert made is not None
    assert isinstance(made.attention, Blocks)
    scores = sum(rows * length**2 for rows, length in (b.shape for b in made.attention.blocks))
    assert packed_sizes(sizes, torch.bfloat16, together=True) == (len(made.source), scores)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 140), min_size=1, max_size=12), st.booleans(), st.integers(0, 9))
def test_sequences_in_one_row_see_themselves_alone(lengths: list[int], causal: bool, seed: int) -> None:
    """Against each sequence's own attention, forwards and backwards, in float64."""
    heads, size, scale, total = 3, 5, 0.4, sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shared = [replace(room, dtype=torch.float64) for room in blockwise._shared(np.array(lengths))]
    blocks = blocks_of(shared, starts, total, heads, torch.device("cpu"))
    draw = torch.Generator().manual_seed(seed)
    given = [torch.randn(total, heads, size, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(3)]
    grad = torch.randn(total, heads, size, generator=draw, dtype=torch.float64)
    found = blocks.attend(*given, scale, causal)
    q, k, v = (x.split(lengths) for x in given)
    own = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in one), is_causal=causal, scale=scale
        ).transpose(0, 1)
        for one in zip(q, k, v)
    ]
    wanted = torch.cat(own)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for mine, other in zip(torch.autograd.grad(found, given, grad), torch.autograd.grad(wanted, given, grad)):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_who_is_packed() -> None:
    assert packable(bert()) is not None
    bloom = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=2, n_head=4)
    assert packable(transformers.BloomModel(bloom)) is None  # its attention is its own
    capped = transformers.Gemma3TextConfig(**GROUPED, head_dim=8, attn_logit_softcapping=50.0)
    assert packable(transformers.Gemma3TextModel(capped)) is None
    everywhere = transformers.MistralConfig(**GROUPED, sliding_window=None)
    assert (found := packable(transformers.MistralModel(everywhere))) is not None
    assert found.window == sys.maxsize
    config = transformers.BertConfig(**SIZES, num_labels=len(LABELS))
    whole = transformers.BertForSequenceClassification(config)
    outside = load_backbone(whole, "text-classification", labels=LABELS, targets=["query", "pooler.dense"])
    assert not outside.packs(8)  # an adapted layer that sees padded sequences
    base = backbone("bert", torch.float32)
    assert base.packs(LONG[torch.float32] - 1)
    assert not base.packs(LONG[torch.float32])
    left = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert packing(left, 2, torch.float32) is None


def test_answers_are_generated_after_a_packed_pass() -> None:
    base = known("llama", torch.float32)
    module: Any = base.module
    ids = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = module.generate(ids, **settings)
    base.forward(batch())
    assert torch.equal(module.generate(ids, **settings), before)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=7))
def test_no_other_blocks_are_cheaper(lengths: list[int]) -> None:
    def price(parts: list[list[int]]) -> int:
        return sum(BLOCK + len(part) * (-(-max(part) // BIN) * BIN) ** 2 for part in parts)

    found = partition(np.array(lengths))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    ordered = sorted(lengths)
    every = [
        [ordered[a:b] for a, b in pairwise([0, *inner, len(ordered)])]
        for count in range(len(ordered))
        for inner in combinations(range(1, len(ordered)), count)
    ]
    assert price([[lengths[i] for i in part] for part in found]) == min(price(parts) for parts in every)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=40), st.integers(1, 500))
def test_runs_are_even_and_keep_the_budget(lengths: list[int], budget: int) -> None:
    sizes = np.sort(np.array(lengths))
    runs = evenly(sizes, budget)
    assert [a for a, _ in runs] + [len(sizes)] == [0] + [b for _, b in runs]
    tokens = [int(sizes[a:b].sum()) for a, b in runs]
    assert all(count <= budget or b - a == 1 for count, (a, b) in zip(tokens, runs))
    assert max(tokens) <= sum(tokens) / len(tokens) + 2 * max(lengths)


@pytest.mark.parametrize(("lanes", "most"), [(1, 0.09), (8, 0.03), (16, 0.025)])
def test_hardly_a_token_of_padding_is_computed(lanes: int, most: float) -> None:
    """On lengths of real text, in bfloat16, whose tokens fill up to a multiple of 32 or 64."""
    real = computed = 0
    for seed in range(20):
        lengths = np.sort(texts(lanes, seed))
        runs = evenly(lengths, 2048)
        computed += sum(packed_sizes(lengths[a:b], torch.bfloat16)[0] for a, b in runs)
        real += int(lengths.sum())
    assert 1 - real / computed < most


def order(tree: dict[str, torch.Tensor]) -> Fit:
    return Fit(Model(tree), ("A", "B", "head"), steps=2, batch_size=4, optimizer=Optimizer("sgd", 0.1))


@pytest.mark.parametrize("rows", ["apart", "shared"])
@pytest.mark.parametrize("broken", ["factor", "overflow"])
def test_a_lane_that_is_not_finite_leaves_the_others_alone_in_bfloat16(
    broken: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lanes then share two products, in which zero times infinity is not a number, and rows of attention: the pass is
    done again apart."""
    if rows == "shared":
        monkeypatch.setattr(packed, "rooms", lambda n, kind, all=False: blockwise._shared(n) if all else rooms(n, kind))
    base = backbone("bert", torch.bfloat16)
    found = []
    for ill in (False, True):
        executor = learner(base, 3, spec=spec_of(base, torch.float32))
        trees = {f"c{k}": adapter(executor.spec, 3, seed=k) for k in range(3)}
        if ill:
            site = next(iter(base.sites))
            trees["c1"][f"{site}/B"] = torch.full_like(
                trees["c1"][f"{site}/B"], torch.inf if broken == "factor" else 3e38
            )
        fits = run(executor, {client: order(tree) for client, tree in trees.items()})
        scores = run(executor, {client: Score(Model(tree), "test") for client, tree in trees.items()})
        found.append((fits, scores))
    (plain, scored), (fits, scores) = found
    assert isinstance(fits["c1"], Diverged)
    for client in ("c0", "c2"):
        assert distance(fits[client].params, plain[client].params) < 0.02
        assert scores[client]["loss"][0] == pytest.approx(scored[client]["loss"][0], rel=0.02)
