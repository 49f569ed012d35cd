"""An interpolated modified Kneser-Ney n-gram model over token ids: the baseline of the embedded model."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BITS = 12
"""Bits per token in a packed n-gram; five tokens of a 4096-word vocabulary fit one 64-bit integer."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """Counts of one order n: n-grams (packed, sorted) and their contexts of n - 1 tokens with totals and back-off."""

    ngrams: Ints
    counts: Ints
    contexts: Ints
    totals: NDArray[np.float64]
    backoff: NDArray[np.float64]
    discounts: NDArray[np.float64]


def fit(tokens: Ints, order: int = 5) -> list[Order]:
    """Modified Kneser-Ney (Chen and Goodman): the highest order counts occurrences, the lower ones left contexts."""
    if not 0 < order * BITS < 64 or tokens.min() < 0 or tokens.max() >= 1 << BITS:
        raise ValueError(f"order {order} and token ids below {1 << BITS} must fit 63 bits")
    ngrams, counts = np.unique(_pack(tokens, order), return_counts=True)
    orders = [_order(ngrams, counts)]
    for lower in range(order - 1, 0, -1):
        ngrams, counts = np.unique(ngrams & ((1 << BITS * lower) - 1), return_counts=True)
        orders.append(_order(ngrams, counts))
    return orders[::-1]


def bits(orders: list[Order], tokens: Ints, vocabulary: int) -> NDArray[np.float64]:
    """-log2 p(token | the n - 1 before it) for every token from the n-th on, shape (len(tokens) - n + 1,)."""
    windows = _pack(tokens, len(orders))
    p = np.full(len(windows), 1.0 / vocabulary)
    for n, model in enumerate(orders, start=1):
        ngram = windows & ((1 << BITS * n) - 1)
        count = _look_up(model.ngrams, model.counts, ngram)
        total = _look_up(model.contexts, model.totals, ngram >> BITS)
        backoff = _look_up(model.contexts, model.backoff, ngram >> BITS)
        kept = np.maximum(count - model.discounts[np.minimum(count, 3)], 0.0)
        p = np.where(total > 0, (kept + backoff * p) / np.maximum(total, 1.0), p)
    return -np.log2(p)


def _pack(tokens: Ints, n: int) -> Ints:
    packed = np.zeros(len(tokens) - n + 1, dtype=np.int64)
    for i in range(n):
        packed = (packed << BITS) | tokens[i : len(tokens) - n + 1 + i]
    return packed


def _order(ngrams: Ints, counts: Ints) -> Order:
    n1, n2, n3, n4 = (max(int((counts == k).sum()), 1) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    discounts = np.clip(discounts, 0.0, [0.0, 1.0, 2.0, 3.0])
    contexts, starts = np.unique(ngrams >> BITS, return_index=True)
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    backoff = np.add.reduceat(discounts[np.minimum(counts, 3)], starts)
    return Order(ngrams, counts, contexts, totals, backoff, discounts)


def _look_up(keys: Ints, values: np.ndarray, wanted: Ints) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
