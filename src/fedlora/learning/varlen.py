"""Attention of sequences that lie end to end, by torch's kernel for them (FlashAttention): no padding, no blocks.

    O = softmax(scale * Q K^T + mask) V      for each sequence and head

The kernel computes in float16 and bfloat16 on GPUs. Which GPUs, head sizes and versions of torch it takes it alone
knows, so it is used where a try of it agrees with plain products (``agrees``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
LIMIT = 0.02
"""The largest relative error (Frobenius) of outputs and gradients with which the kernel is accepted."""
TRIED = (1, 40, 7, 130, 16)
"""Lengths of the sequences that it is tried on."""


@dataclass(frozen=True, eq=False)
class Ends:
    """Sequences end to end. ``ends`` (sequences + 1,), int32: where each begins, and the end of the last; ``longest``:
    the length of the longest."""

    ends: Tensor
    longest: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        """``query``, ``key``, ``value``: (tokens, heads, size), and so the result."""
        from torch.nn.attention.varlen import varlen_attn  # torch has it from 2.10 on

        window = (-1, 0) if causal else (-1, -1)
        out = varlen_attn(
            query, key, value, self.ends, self.ends, self.longest, self.longest, scale=scale, window_size=window
        )
        assert isinstance(out, Tensor)
        return out


@cache
def agrees(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether the kernel is there for heads of this size and gives, gradients too, what plain products give."""
    if device.type != "cuda" or dtype not in HALVES:
        return False
    try:
        return all(apart(device, dtype, size, causal) < LIMIT for causal in (False, True))
    except (ImportError, TypeError, ValueError, RuntimeError):  # an older torch or GPU, or a size that it does not take
        return False


def apart(device: torch.device, dtype: torch.dtype, size: int, causal: bool) -> float:
    """The largest relative error (Frobenius) of the kernel's output and gradients on random sequences."""
    draw = torch.Generator().manual_seed(size)
    query, key, value, grad = (torch.randn(sum(TRIED), 2, size, generator=draw).to(dtype) for _ in range(4))
    scale = size**-0.5
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    parts = zip(*(x.split(TRIED) for x in exact), strict=True)
    wanted = torch.cat([_plain(q, k, v, scale, causal) for q, k, v in parts])
    q, k, v = given = [x.to(device).requires_grad_() for x in (query, key, value)]
    ends = torch.tensor([0, *TRIED]).cumsum(0).to(device, torch.int32)
    found = Ends(ends, max(TRIED)).attend(q, k, v, scale, causal)
    gradients = torch.autograd.grad(found, given, grad.to(device))
    pairs = [(found, wanted), *zip(gradients, torch.autograd.grad(wanted, exact, grad.double()), strict=True)]
    return max(float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs)


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """One sequence (length, heads, size) by products."""
    return torch.einsum("hqk,khd->qhd", _scores(query, key, scale, causal).softmax(-1), value)


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    scores = scale * torch.einsum("qhd,khd->hqk", query, key)
    return scores + torch.full_like(scores, -torch.inf).triu(1) if causal else scores
