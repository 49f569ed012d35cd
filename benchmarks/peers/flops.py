"""Matrix products of a client-step of an encoder with LoRA, counted by hand, and the machine's peak for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Encoder:
    """A BERT-like encoder with LoRA of ``rank`` on query and value of every layer."""

    layers: int
    width: int
    inner: int
    rank: int

    def sequence(self, length: int) -> int:
        """Operations of one sequence, forwards and backwards, without padding; the head's few are left out.

        Gradients reach the inputs of frozen linears, but not below the lowest layer: there query, key and value pass
        nothing on, and the keys need none.
        """
        square, wide = 2 * length * self.width**2, 2 * length * self.width * self.inner
        linears = 4 * square + 2 * wide
        attention = 2 * (2 * length * length * self.width)
        lora = 2 * (2 * (2 * length * self.width * self.rank))
        forwards = self.layers * (linears + attention + lora)
        backwards = self.layers * (linears + 2 * attention + 2 * lora)
        lowest = 3 * square + attention // 2 + lora // 2
        return forwards + backwards - lowest

    def per_step(self, lengths: Iterable[int], steps: int) -> float:
        """Of a client-step, on average."""
        return sum(self.sequence(int(length)) for length in lengths) / steps


def peak(encoder: Encoder, tokens: int, seconds: float = 1.0) -> float:
    """Operations a second of the bfloat16 products of one layer with so many tokens: the faster of what torch does
    with a weight as it is and with one that oneDNN has laid out once. The best of several repeats."""
    shapes = [(encoder.width, encoder.width)] * 4 + [(encoder.inner, encoder.width), (encoder.width, encoder.inner)]
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    inputs = {size: torch.randn(tokens, size).bfloat16() for size in {weight.shape[1] for weight in weights}}
    cases = [(inputs[weight.shape[1]], weight) for weight in weights]
    work = sum(2 * tokens * weight.numel() for weight in weights)

    def plainly() -> None:
        for x, weight in cases:
            functional.linear(x, weight)

    ways = [plainly]
    if (packed := _packed(cases)) is not None:
        ways.append(packed)
    with torch.no_grad():
        return work / min(_best(way, seconds / len(ways)) for way in ways)


def _packed(cases: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None] | None:
    """The same with weights in oneDNN's own layout, if this torch can."""
    try:
        own = [(x, torch.ops.mkldnn._reorder_linear_weight(weight, len(x))) for x, weight in cases]

        def run() -> None:
            for x, weight in own:
                torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

        run()
    except (AttributeError, RuntimeError):
        return None
    return run


def _best(way: Callable[[], None], seconds: float) -> float:
    way()
    best, end = float("inf"), time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        way()
        best = min(best, time.perf_counter() - begin)
    return best
