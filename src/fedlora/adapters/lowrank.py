"""Truncated SVD of a change dW, by the cheapest way whose computed error stays below 1e-5.

What counts as an error. Let X* be the best rank-r approximation of dW and X what is served. ``|X - X*| <= 1e-5 |dW|``
(Frobenius) wherever X* is unique. Where singular values tie at the cut, it is not: any of the tied directions serves as
well, and rounding decides which one comes out. There the *excess* counts, which no tie can raise:

    |dW - X|^2 <= |dW - X*|^2 + (1e-5 |dW|)^2

Away from ties both say the same. Ways, cheapest first; each hands on to the next what it does not fit:

1. ``iterate``: subspace iteration in float32 with small parts in float64, on the factors or on the product, whichever
   has fewer numbers; it begins with a *start* (last round's right singular vectors) where there is one, and on a
   product with some steps in bfloat16 where these are fast. It stops by a bound that it computes in float32, and gives
   up early where the spectrum is too flat for its budget of products.
2. Small sites: a dense SVD in float64, or that of the core of stacked factors.
3. ``flat``: the eigenvectors of dW dW^T in float32, for what the iteration has found too flat, by the ``filtered``
   iteration where few of many are wanted; checked by residuals.
4. The same in float64 (``gram``), whose squares lose nothing that matters: directions below 1e-8 of the largest.

Where the factors' rank is below half the smaller side, 3 and 4 work on their core. Factors whose terms nearly cancel
are left to 2 and 4, and values at the cut that float32 hardly tells apart are told apart by one product in float64.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from fedlora.adapters.algebra import factors, linalg
from fedlora.adapters.change import Change, Leading, dense_svd, orthonormal, qr, with_rest
from fedlora.adapters.subspace import TOLERANCE, filtered, iterate, settled, width
from fedlora.federation.spec import Tree, stream

DEAD = 1e-10  # singular values below this share of the largest are rounding
SMALL = 256  # smaller sides up to this one are decomposed densely
TILE = 256  # rows whose Gram matrix is one product
TERMS = 16  # of |dW|: terms whose rounding in float32 is still below 1e-5 of their sum
MANY = 16  # eigenvectors for each wanted one above which the wanted are iterated for


def change_of(tree: Tree, site: str, dtype: torch.dtype | None = None) -> Change:
    """A site's dW in the form that it has in the tree."""
    if f"{site}/W" in tree:
        return Change(tree[f"{site}/W"].to(dtype))
    return Change(*factors(tree, site, dtype))


def svd(tree: Tree, site: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of one site's dW in float64; by QR of the factors where their rank is below half the smaller side."""
    return _exact(change_of(tree, site, torch.float64))


def _exact(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    if change.right is None or 2 * change.left.shape[1] >= min(change.shape):
        return dense_svd(change.product())
    (left, upper), (right, lower) = qr(change.left), qr(change.right.T)
    u, s, vt = dense_svd(upper @ lower.T)
    return left @ u, s, vt @ right.T


def truncate(tree: Tree, site: str, rank: int, seed: int, start: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """(A, B, error) of the best rank-r approximation of dW: A = V_r^T (orthonormal rows), B = U_r S_r for scale 1,
    error = |dW - B A| / |dW|. The rank is clamped to min(out, in); A (r, in), B (out, r), float64.

    ``start`` (k, in) are rows near the leading right singular vectors, such as the A that the last round served: they
    save time where they are near, and change no more than the last digits wherever they are.

    Rows without a singular value are a *seeded* completion, never the SVD's own null vectors: those are decided by
    rounding, so another order of replies would serve other rows. Signs are fixed for the same reason.

    >>> change = {"q/A": torch.eye(2, 3), "q/B": torch.diag(torch.tensor([3.0, 4.0])), "q/scale": torch.tensor(1.0)}
    >>> a, b, error = truncate(change, "q", 1, seed=0)
    >>> b @ a, error
    (tensor([[0., 0., 0.],
            [0., 4., 0.]], dtype=torch.float64), 0.6)
    """
    change = change_of(tree, site)
    rank = min(rank, *change.shape)
    found = leading(change, rank, seed, start)
    size = math.hypot(found.rest, float(linalg.vector_norm(found.s)))
    live = int((found.s > undecided(change.left.dtype) * size).sum()) if size else 0
    kept, right = min(rank, live), found.v.T
    sign = torch.sign(right[:kept].gather(1, right[:kept].abs().argmax(1, keepdim=True)))
    left = functional.pad(found.u[:, :kept] * sign.T * found.s[:kept], (0, rank - kept))
    error = math.hypot(found.rest, float(linalg.vector_norm(found.s[kept:]))) / max(size, 1e-300)
    return complete(right[:kept] * sign, rank, seed), left, error


def undecided(dtype: torch.dtype) -> float:
    """The share of |dW| below which singular values are rounding of a sum in this type: 1e-10 in float64."""
    return DEAD if dtype == torch.float64 else 1e-7


def complete(rows: Tensor, rank: int, seed: int) -> Tensor:
    """Orthonormal rows (k, in), continued to ``rank`` of them by a seeded draw."""
    draw = torch.randn(rank - rows.shape[0], rows.shape[1], generator=stream(seed, "complete"), dtype=rows.dtype)
    if not len(draw):
        return rows
    for _ in range(2):  # once leaves rounding, twice is enough
        draw = draw - draw @ rows.T @ rows
    q, upper = qr(draw.T)
    sign = torch.where(torch.diagonal(upper) < 0, -1.0, 1.0).to(q.dtype)  # which qr leaves to rounding
    return torch.cat([rows, (q * sign).T])


# -- the choice, and its ways


def leading(change: Change, rank: int, seed: int, start: Tensor | None = None) -> Leading:
    """The leading ``rank`` triplets, by the first of the module's ways that fits."""
    if min(change.shape) > SMALL and 4 * width(rank) <= change.inner:
        small = change.to(torch.float32)
        if small.right is not None and small.left.numel() + small.right.numel() >= math.prod(small.shape):
            small = Change(small.product())
        found = iterate(small, rank, seed, start) or flat(small, rank, seed)
        if found is not None and not _cancels(change, math.hypot(found.rest, float(linalg.vector_norm(found.s)))):
            return found
    wide = change.to(torch.float64)
    if min(wide.shape) <= SMALL:
        u, s, vt = _exact(wide)
        return Leading(u[:, :rank], s[:rank], vt[:rank].T, float(linalg.vector_norm(s[rank:])))
    if wide.right is None or 2 * wide.left.shape[1] >= min(wide.shape):
        return gram(wide.product(), rank)
    (left, upper), (right, lower) = orthonormal(wide.left), orthonormal(wide.right.T)
    found = gram(upper @ lower.T, min(rank, len(upper)))
    return replace(found, u=left @ found.u, v=right @ found.v)


def _cancels(change: Change, size: float) -> bool:
    """Whether the terms of a product sum to so little, ``size``, that float32's rounding of them is much of it."""
    if change.right is None:
        return False
    terms = change.left.square().sum(0).sqrt().double() * linalg.vector_norm(change.right, dim=1)
    return not float(linalg.vector_norm(terms)) <= TERMS * size  # squares that float32 does not hold count as much


def flat(change: Change, rank: int, seed: int) -> Leading | None:
    """By the eigenvectors of dW dW^T in float32, some more than are wanted; None where that is not enough.

    One step in float64 makes triplets of them: ``dW^T u_i = s_i v_i`` exactly, and ``e_i = |dW v_i - s_i u_i|`` is
    measured. A wanted direction that is off by an angle of theta towards one outside, of singular value at most t, has
    e = theta (s^2 - t^2) / s and loses theta^2 (s^2 - t^2) of |dW|^2: that is ``e_i^2 s_i^2 / (s_i^2 - t^2)``, which
    must stay below the tolerance. t is the value a quarter into the columns beyond the wanted ones, as in ``bound``.

    Of factors with few columns, with L = Q T, the core T R R^T T^T has the squares, and Q x = L T^-1 x.
    """
    if change.shape[0] > change.shape[1]:
        found = flat(change.transposed, rank, seed)
        return found and found.swapped
    upper = None
    if change.right is None or 2 * change.left.shape[1] >= min(change.shape):
        squares = _squares(change.product())
    else:
        lower, failed = linalg.cholesky_ex(_squares(change.left.T))
        if int(failed):
            return None
        upper = lower.T
        squares = upper @ _squares(change.right) @ upper.T
    size = float(squares.diagonal().sum(dtype=torch.float64))
    if not math.isfinite(size):  # squares of what float32 still holds; no other is larger than the diagonal's
        return None
    vectors = filtered(squares, rank, seed) if MANY * width(rank) <= len(squares) else None
    if vectors is None:
        vectors = linalg.eigh(squares)[1][:, -width(rank) :]
    if upper is not None:
        vectors = change.left @ linalg.solve_triangular(upper, vectors, upper=True)
    u, _ = orthonormal(vectors.double())
    found = settled(change.transposed, u, change.transposed.times(u.float()).double(), rank).swapped
    u, s, v = found.u, found.s, found.v
    missed = (change.times(v.float()).double() - u * s).square().sum(0)[:rank]
    every = s**2
    gap = every[:rank] - every[rank + (len(every) - rank) // 4]
    if not float((missed * every[:rank] / gap.clamp_min(0)).sum()) <= TOLERANCE**2 * size:
        return None
    return with_rest(change, u[:, :rank], s[:rank], v[:, :rank], size)


def _squares(matrix: Tensor) -> Tensor:
    """M M^T, of which the part below the diagonal blocks is not computed twice."""
    return _halved(matrix, matrix.new_empty(len(matrix), len(matrix)))


def _halved(matrix: Tensor, out: Tensor) -> Tensor:
    if len(matrix) <= TILE:
        return torch.mm(matrix, matrix.T, out=out)
    half = len(matrix) // 2
    first, second = matrix[:half], matrix[half:]
    _halved(first, out[:half, :half])
    _halved(second, out[half:, half:])
    out[half:, :half] = torch.mm(first, second.T, out=out[:half, half:]).T
    return out


def gram(matrix: Tensor, rank: int) -> Leading:
    """By the eigenvectors U_r of dW dW^T (or of dW^T dW, the smaller): dW = U_r (U_r^T dW) + rest, and the small side's
    SVD makes it triplets, orthonormal also where singular values are too small for their squares."""
    if matrix.shape[0] > matrix.shape[1]:
        return gram(matrix.T, rank).swapped
    values, vectors = linalg.eigh(_squares(matrix))
    u = vectors[:, -rank:]
    right, core = qr(matrix.T @ u)
    inner, s, vt = dense_svd(core.T)
    rest = math.sqrt(float(values[:-rank].clamp_min(0).sum())) if rank < len(values) else 0.0
    return Leading(u @ inner, s, right @ vt.T, rest)
