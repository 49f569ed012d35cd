"""Attention by torch's kernel for sequences end to end, which here, without a GPU, plain products stand in for.

What is called is torch's own function with its own checks and its own way backwards; only the two operations below it,
which exist on GPUs alone, are given to the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen  # brings the operations that the fixture gives to the CPU
from torch import Tensor

from fedlora.learning import varlen
from fedlora.learning.flops import Counter
from fedlora.learning.packing import Packing, packed_sizes, packing
from fedlora.learning.varlen import Ends, agrees, apart
from learning.test_packing import LENGTHS, batch, gated, known, outcome
from learning.test_packing import apart as relative

CPU = torch.device("cpu")


def forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the kernel is documented to compute; it refuses what the kernel refuses."""
    assert cu_seq_k is not None
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.ndim == 3
    assert scale is not None
    ends = cu_seq_q.tolist()
    assert ends[-1] == len(query)
    assert max_q == max_k == max(b - a for a, b in pairwise(ends))
    parts = [varlen._plain(query[a:b], key[a:b], value[a:b], scale, is_causal) for a, b in pairwise(ends)]
    return torch.cat(parts), query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_seq_q: Tensor,
    cu_seq_k: Tensor, max_q: int, max_k: int, is_causal: bool, rng: Tensor, scale: float | None = None, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert scale is not None
    grads = tuple(map(torch.empty_like, (query, key, value)))
    for a, b in pairwise(cu_seq_q.tolist()):
        q, k, v, g = (x[a:b].transpose(0, 1) for x in (query, key, value, grad))
        weights = varlen._scores(query[a:b], key[a:b], scale, is_causal).softmax(-1)
        into = g @ v.mT
        into = weights * (into - (into * weights).sum(-1, keepdim=True))
        for whole, part in zip(grads, (scale * into @ k, scale * into.mT @ q, weights.mT @ g)):
            whole[a:b] = part.transpose(0, 1)
    return grads


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    with torch.library._scoped_library("torch_attn", "FRAGMENT") as library:
        torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward, lib=library)
        torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward, lib=library)
        yield


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "agrees", lambda *_: True)


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_called_as_torch_asks(causal: bool) -> None:
    assert apart(CPU, torch.float64, 8, causal) < 1e-12
    assert apart(CPU, torch.bfloat16, 8, causal) < varlen.LIMIT


@pytest.mark.usefixtures("accepted")
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "qwen2"])
def test_sequences_end_to_end_give_the_numbers_of_padded_ones(kind: str, together: bool) -> None:
    base = known(kind)
    assert base.by_ends
    found, wanted = outcome(base, True, together), outcome(base, False)
    close = 1e-11 if base.kind != "causal-lm" else 1e-5  # Llama's own attention rounds its weights to float32
    assert relative((found[0], *found[1]), (wanted[0], *wanted[1])) < close


def test_its_operations_are_counted() -> None:
    query = torch.zeros(sum(LENGTHS), 3, 8).requires_grad_()
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    with Counter() as counter:
        Ends(ends, max(LENGTHS)).attend(query, query, query, 1.0, False).sum().backward()
    product = 2 * 3 * 8 * sum(length**2 for length in LENGTHS)
    assert counter.total == (2 + 5) * product


@pytest.mark.usefixtures("accepted")
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_all_of_a_pass_is_on_the_device(kind: str, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's device without numbers, whose tensors meet no others; what it cannot say is where tokens are."""

    def there(mask: Tensor, *options: Any) -> Packing | None:
        made = packing(batch()["attention_mask"], *options)
        assert made is not None
        assert isinstance(made.attention, Ends)
        ends = replace(made.attention, ends=made.attention.ends.to(mask.device))
        return replace(made, source=made.source.to(mask.device), back=made.back.to(mask.device), attention=ends)

    monkeypatch.setattr("fedlora.learning.packing.packing", there)
    base = known(kind, torch.bfloat16).to(device="meta")
    plan, _ = gated(base)
    slots = {
        site: tuple(
            replace(f, A=f.A.to("meta"), B=f.B.to("meta"), gate=None if f.gate is None else f.gate.to("meta"))
            for f in (found[:1] if together else found)
        )
        for site, found in plan.slots.items()
    }
    assert plan.dropout is not None
    dropout = replace(plan.dropout, keys=plan.dropout.keys.to("meta"))
    inputs = {name: value.to("meta") for name, value in batch().items()}
    features, logits = base.forward(inputs, replace(plan, slots=slots, dropout=dropout), together=together)
    out = (features if logits is None else logits).float().square().sum()
    leaves = [value for found in slots.values() for f in found for value in (f.A, f.B)]
    assert {value.device.type for value in torch.autograd.grad(out, leaves)} == {"meta"}


def test_where_sequences_end() -> None:
    made = packing(batch()["attention_mask"], 4, torch.bfloat16, by_ends=True)
    assert made is not None
    assert isinstance(made.attention, Ends)
    assert made.attention.ends.tolist() == np.concatenate([[0], np.cumsum(LENGTHS)]).tolist()
    assert made.attention.longest == max(LENGTHS)
    tokens, scores = packed_sizes(np.array(LENGTHS), torch.bfloat16, by_ends=True)
    assert tokens == len(made.source) == sum(LENGTHS)  # nothing fills up
    assert scores == sum(length**2 for length in LENGTHS)


@pytest.mark.parametrize(
    ("result", "expected"),
    [(1e-3, True), (0.3, False), (float("nan"), False), (RuntimeError("no kernel"), False), (TypeError(), False)],
)
def test_it_is_used_where_a_try_agrees(
    result: float | Exception, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(*_: Any) -> float:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(varlen, "apart", tried)
    agrees.cache_clear()
    assert agrees(torch.device("cuda"), torch.bfloat16, 32) == expected
    assert not agrees(torch.device("cuda"), torch.float32, 32)
    assert not agrees(CPU, torch.bfloat16, 32)
    agrees.cache_clear()
