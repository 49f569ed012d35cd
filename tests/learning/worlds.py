"""Tiny models and random examples for the learner's tests."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
import transformers

from fedlora.federation.client import Job
from fedlora.federation.orders import Order
from fedlora.federation.spec import ModelSpec, stream
from fedlora.learning.backbone import Backbone
from fedlora.learning.learner import Learner
from fedlora.learning.loading import load_backbone
from fedlora.learning.tasks import Examples, TextClassification

VOCAB, LABELS = 60, ("red", "green", "blue")
RANKS = (2, 3, 4)


def bert(**changes: Any) -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=64, **changes,
    )  # fmt: skip
    return seeded(lambda: transformers.BertModel(config, add_pooling_layer=False))


def llama(causal: bool = True) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return seeded(lambda: (transformers.LlamaForCausalLM if causal else transformers.LlamaModel)(config))


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=2, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def seeded(make: Any) -> torch.nn.Module:
    """A module with random weights of a size that matters (the libraries' own are small), the same in every test."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = make()
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    return module.eval()


def backbone(kind: str = "bert", dtype: torch.dtype = torch.float64, **options: Any) -> Backbone:
    if kind == "bert":
        return load_backbone(bert(), "text-classification", labels=LABELS, dtype=dtype, **options)
    return load_backbone({"llama": llama, "gpt2": gpt2}[kind](), "causal-lm", dtype=dtype, **options)


def spec_of(base: Backbone, dtype: torch.dtype = torch.float64, **options: Any) -> ModelSpec:
    return base.spec(max(RANKS), alpha=8.0, dtype=dtype, **options)


def examples(count: int, seed: int = 0, causal: bool = False) -> Examples:
    """Random sequences of 3 to 30 tokens whose label depends on their tokens."""
    draw = np.random.default_rng(seed)
    lengths = np.minimum(draw.geometric(0.12, count) + 2, 30)
    offsets = np.concatenate([[0], lengths.cumsum()])
    tokens = draw.integers(3, VOCAB, offsets[-1]).astype(np.int32)
    labels = np.array([tokens[a:b].sum() % len(LABELS) for a, b in itertools.pairwise(offsets)])
    extra: dict[str, Any] = {}
    if causal:
        extra = {"first": np.minimum(draw.integers(1, 4, count), lengths - 1), "bytes": 2 * lengths}
        labels = np.zeros(count, dtype=np.int64)
    return Examples(lengths, labels, np.arange(count + 1), tokens, offsets, **extra)


def splits(clients: int, seed: int = 0) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """Uneven example counts: client k has 9 + 4 k for training, 5 held out and 7 for the test."""
    found, start = {}, 0
    for k in range(clients):
        sizes = {"fit": 9 + 4 * k, "holdout": 5, "test": 7}
        own = {}
        for name, size in sizes.items():
            own[name] = np.arange(start, start + size)
            start += size
        found[f"c{k}"] = own
    return found, start


def learner(base: Backbone, lanes: int = 1, clients: int = 6, **options: Any) -> Learner:
    parts, count = splits(clients)
    options = {
        "spec": spec_of(base, base.dtype),
        "examples": examples(count),
        "task": TextClassification(LABELS),
    } | options
    return Learner({"base": base}, splits=parts, run_seed=3, lanes=lanes, tokens=120, **options)


def run(executor: Learner, orders: dict[str, Order], seed: int = 5) -> dict[str, Any]:
    """Submits one order per client and runs them to their ends."""
    names = {}
    for k, (client, order) in enumerate(orders.items()):
        names[executor.submit(Job(order, seed + k, client))] = client
    results: dict[str, Any] = {}
    while not executor.idle:
        results |= {names[ticket]: result for ticket, result in executor.advance()}
    return results


def adapter(spec: ModelSpec, rank: int, seed: int, core: bool = False) -> dict[str, torch.Tensor]:
    """An adapter with B not zero, and the spec's start of whole parameters."""
    tree = spec.adapter(dict.fromkeys(spec.sites, rank), seed) | spec.start(seed)
    for key, value in list(tree.items()):
        if key.endswith("/B"):
            tree[key] = 0.3 * torch.randn(value.shape, generator=stream(seed, key), dtype=value.dtype)
            if core:
                site = key.removesuffix("/B")
                draw = torch.randn(rank, rank, generator=stream(seed, site, "C"), dtype=value.dtype)
                tree[f"{site}/C"] = torch.eye(rank, dtype=value.dtype) + 0.2 * draw
    return tree


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two trees of one shape."""
    assert a.keys() == b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)
