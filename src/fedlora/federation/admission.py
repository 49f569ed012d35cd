"""Who and what is let in: every reason why a reply must not be folded, as functions of values. No engine is needed.

A server asks ``oversized`` before a frame is decoded, and ``fault`` before an update is folded. That an answer belongs
to its question is the engine's to see: it knows whom it asked, and with what nonce.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from fedlora.federation.algorithm import Update
from fedlora.federation.spec import Client, Shape, Tree

Reason = Literal["empty", "names", "shape", "rank", "type", "not finite", "weight", "norm", "size", "meaning"]


@dataclass(frozen=True)
class Refusal:
    """Why something is not let in: a name to count it by, and a sentence that says what was found."""

    reason: Reason
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Limits:
    """What an honest participant does not exceed.

    ``factor``: the norm of an update over the median of those folded in the last ``window`` rounds; ``first``: the norm
    itself as long as there are none; ``message``: the bytes of one frame.
    """

    factor: float = 1000.0
    first: float = 1e5
    window: int = 5
    message: int = 256 * 2**20

    def norm(self, norms: Sequence[Sequence[float]]) -> float:
        """The largest norm let in after rounds whose updates had these norms, the latest last.

        >>> Limits(first=9.0).norm([]), Limits(window=1).norm([[7.0], [1.0, 2.0, 30.0]])
        (9.0, 2000.0)
        """
        known = [norm for round in norms[-self.window :] for norm in round]
        middle = median(known) if known else 0.0
        return self.factor * middle if middle > 0 else self.first

    def kept(self, norms: Sequence[Sequence[float]], round: Sequence[float]) -> list[list[float]]:
        """The norms with those of one more round; a round that folded nothing teaches nothing."""
        known = [list(earlier) for earlier in norms]
        return [*known, sorted(round)][-self.window :] if round else known


def norm(tree: Tree) -> float:
    """The Euclidean norm of all arrays together, in float64.

    >>> norm({"x": torch.full((3, 3), 1.0), "y": torch.tensor(4.0)})
    5.0
    """
    return math.sqrt(sum(float(value.double().square().sum()) for value in tree.values()))


def fits(shape: Shape, expected: Shape) -> bool:
    """Whether a shape is the expected one; where that is negative, any size will do.

    >>> [fits(shape, (-1, 5)) for shape in ((0, 5), (7, 5), (7, 4), (5,))]
    [True, True, False, False]
    """
    return shape == expected or (len(shape) == len(expected) and all(e in (n, -1) for n, e in zip(shape, expected)))


def fault(
    update: Update | None,
    expected: Mapping[str, Shape | None],
    client: Client,
    *,
    dtype: torch.dtype | None = None,
    max_norm: float | None = None,
) -> Refusal | None:
    """Why an update must not be folded, or None.

    Arrays of an agreed shape must be of type ``dtype``. ``max_norm`` bounds the norm of all arrays together. Where the
    rank of a site's factors is left to the client, it is at most the client's registered one.
    """
    if update is None:
        return Refusal("empty", "no update")
    if set(update.arrays) != set(expected):
        return Refusal("names", f"names differ: {_few(sorted(set(update.arrays) ^ set(expected)))}")
    for name, shape in expected.items():
        if problem := _wrong(name, update.arrays[name], shape, dtype):
            return problem
        if (shape is None or -1 in shape) and (problem := _rank(name, update.arrays, client)):
            return problem
    if (name := _unbounded(update.arrays)) is not None:
        return Refusal("not finite", f"{name} is not finite")
    if max_norm is not None and (found := norm(update.arrays)) > max_norm:
        return Refusal("norm", f"the norm {found:.6g} is above the limit {max_norm:.6g}")
    limit = math.inf if client.examples is None else client.examples
    if not 0 < update.weight <= limit or math.isinf(update.weight):
        return Refusal("weight", f"weight {update.weight} is not in (0, {limit}]")
    if not all(math.isfinite(number) for pair in update.sums.values() for number in pair):
        return Refusal("not finite", "its sums are not finite")
    return None


def _few(names: Sequence[str], limit: int = 8) -> str:
    """A stranger's names may be many and long."""
    shown = [name if len(name) <= 80 else name[:77] + "..." for name in names[:limit]]
    return f"{shown}" + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _wrong(name: str, value: torch.Tensor, shape: Shape | None, dtype: torch.dtype | None) -> Refusal | None:
    """What one array is not."""
    if shape is not None and not fits(tuple(value.shape), shape):
        return Refusal("shape", f"{name} has shape {tuple(value.shape)}, not {tuple(shape)}")
    if shape is not None and dtype is not None and value.dtype != dtype:
        return Refusal("type", f"{name} has type {value.dtype}, not {dtype}")
    return None


def _unbounded(arrays: Tree) -> str | None:
    """The first array with a number that is not finite. A sum is finite only if all that it adds is: one look tells,
    unless the sum itself is too large."""
    doubtful = (name for name, value in arrays.items() if not math.isfinite(value.sum()))
    return next((name for name in doubtful if not bool(arrays[name].isfinite().all())), None)


def _rank(name: str, arrays: Tree, client: Client) -> Refusal | None:
    """Factors A (r, in) and B (out, r) of a site have one rank, and not more than the client's."""
    site, _, factor = name.rpartition("/")
    most = client.ranks.get(site)
    if most is None or factor not in ("A", "B"):
        return None
    value = arrays[name]
    rank = value.shape[0 if factor == "A" else -1] if value.dim() == 2 else -1
    if not 0 <= rank <= most:
        return Refusal("rank", f"{name} has shape {tuple(value.shape)}; the client's rank there is {most}")
    other = arrays.get(f"{site}/A")
    if factor == "B" and other is not None and other.dim() == 2 and other.shape[0] != rank:
        return Refusal("rank", f"{site} has factors of ranks {other.shape[0]} and {rank}")
    return None


def oversized(size: int, limits: Limits) -> Refusal | None:
    """Why a frame of this many bytes is not even decoded, or None.

    >>> str(oversized(2**30, Limits()))
    'a message of 1,073,741,824 bytes; the limit is 268,435,456 ([engine] message)'
    """
    if size <= limits.message:
        return None
    return Refusal("size", f"a message of {size:,} bytes; the limit is {limits.message:,} ([engine] message)")
