"""Subspace iteration: the leading singular triplets of a change, and the leading eigenvectors of a symmetric matrix.

Both multiply a few columns again and again, both stop by a bound that they compute, and give up where the spectrum is
too flat for them.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from fedlora.adapters.algebra import linalg
from fedlora.adapters.change import SQUARES, Change, Leading, dense_svd, orthonormal, with_rest
from fedlora.federation.spec import stream

TOLERANCE = 5e-6  # of the computed bound, which is of first order: 6.7e-6 was the most that a search saw lost
STEPS = 16  # products that the iteration may take; by then the Gram matrix is cheaper
DOUBT = 16.0  # how much larger than its residual a direction may be that hides in an unresolved column
EVEN = 0.8  # of the last column's singular value over the last wanted one's, after one product: flat, or nearly
ROUGH = 4  # products in bfloat16 that come first
FILTERS = 12  # polynomials that the filtered iteration may take
ROUNDING = 1e-6  # share of the largest eigenvalue below which float32 knows nothing of a smaller one
GROWTH = 1e4  # of the largest direction over the smallest in one polynomial: float32 still holds both
TIED = 1e-3  # of a relative gap at the cut over the share s^2 of |dW|^2: below, rounding of float32 mixes too much
NOISE = 3e-2  # share of every start's vector that is random: no start is blind to a direction for long


def width(rank: int) -> int:
    """Columns of the iteration: some more than are wanted, for the wanted converge by the gap to the first outside."""
    return rank + 10 + rank // 10


def iterate(change: Change, rank: int, seed: int, start: Tensor | None = None) -> Leading | None:
    """Subspace iteration on a float32 change; None where its bound (``bound``) is not reached within ``STEPS``.

    A step multiplies an orthonormal basis Q by dW or dW^T in turn: ``dW Q = P T``, and the SVD ``T = a S b^T`` gives
    triplets (P a, S, Q b). The next step's product ``dW^T (P a)`` is the next basis and at once the residual
    ``dW^T (P a) - (Q b) S`` of these, so the check is free; what it bounds is the step just
    taken, which is what is returned.
    """
    basis, turned = _near(change, _begin(change, width(rank), seed, start))
    step, found, previous, checked = change.transposed if turned else change, None, math.inf, 0
    for taken in range(STEPS):
        image = step.times(basis.float()).double()
        limit = math.inf if found is None else bound(found, image, rank)
        if limit <= TOLERANCE:
            found = settled(step, basis, image, rank)
            found = found.swapped if turned else found
            return with_rest(change, found.u[:, :rank], found.s[:rank], found.v[:, :rank])
        first, found = found is None, within(basis, image)
        s = found.s
        if first and float(s[-1]) > EVEN * float(s[rank - 1]):
            return None
        checked += limit < math.inf
        if checked and _hopeless(s, rank, limit, previous, STEPS - 1 - taken):
            return None
        basis, step, previous, found, turned = found.u, step.transposed, limit, found.swapped, not turned
    return None


def _near(change: Change, columns: Tensor) -> tuple[Tensor, bool]:
    """An orthonormal basis of the columns after some products in bfloat16, where these are fast, and whether it is one
    of dW's columns then (else of its rows).

    The first products only have to find the neighbourhood: those that follow shrink what the type has rounded as they
    shrink every error. Factors with few columns are not worth it.
    """
    turned = False
    if change.right is None and halves_are_fast():
        fast = Change(change.left.bfloat16())
        for step in (*(ROUGH // 2 * (fast, fast.transposed)), change):  # the last one makes up for what was rounded
            image = step.times(orthonormal(columns.float())[0].to(step.left.dtype))
            if not math.isfinite(float(linalg.vector_norm(image))):  # what float32 still holds
                break
            columns, turned = image, not turned
    return orthonormal(columns.double())[0], turned


@cache
def halves_are_fast() -> bool:
    """Whether this processor has instructions for products in bfloat16."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def bound(found: Leading, image: Tensor, rank: int) -> float:
    """How far the truncation by the *next* triplets, those of ``image``, is from dW's own, as a share of |dW|.

    ``found`` are triplets with ``dW^T u_i = s_i v_i`` exactly (or the transposed), ``image`` holds ``dW v_i``. Their
    residuals ``e_i = |dW v_i - s_i u_i|`` lie outside the subspace of all u, because the triplets diagonalise dW within
    it. A wanted direction i and one outside, of singular value at most t, then mix as in [[s_i, e_i], [0, t]],
    which moves the truncation by

        e_i s_i sqrt(s_i^2 + t^2) / (s_i^2 - t^2),         and never by more than sqrt(s_i^2 + t^2 + e_i^2)

    and that of the next triplets by t / s_i of the first (both to first order in e; the second is that the whole
    direction is wrong, which is what is left of directions without a singular value, and of ties with the outside, for
    which the iteration then gives up). t is read within the columns beyond the wanted ones, a quarter into them: larger
    than what lies outside them all once these have been multiplied a few times, also before they have converged.

    A start may hold a direction in place of a better one, and know it exactly: then no e tells. The better one is in
    the columns beyond, which are random, but not resolved yet: each of them may stand for one of s_j^2 + DOUBT e_j^2,
    and what of that exceeds the last wanted one's s^2 counts as lost.
    """
    every = found.s**2
    residuals = (image - found.u * found.s).square().sum(0)
    t, s, e = every[rank + (len(every) - rank) // 4], every[:rank], residuals[:rank]
    mixed = e * t * (s + t) / (s - t).clamp_min(0).square()  # s and t are squares here
    moved = torch.minimum(mixed.nan_to_num(math.inf, math.inf), s + t + e)
    passed = (every[rank:] + DOUBT * residuals[rank:] - s[-1]).clamp_min(0)
    return math.sqrt(float((moved.sum() + passed.sum()) / every.sum().clamp_min(1e-300)))


def within(basis: Tensor, image: Tensor) -> Leading:
    """The triplets of dW within the columns of an orthonormal basis. ``image``: dW times these."""
    partner, core = orthonormal(image)
    inner, s, vt = dense_svd(core)
    return Leading(partner @ inner, s, basis @ vt.T)


def settled(step: Change, basis: Tensor, image: Tensor, rank: int) -> Leading:
    """``within``, by a product in float64 where the singular values at the cut are close.

    Rounding of eps turns a wanted direction by eps s / gap towards the next one, which loses (eps s)^2 2 s / gap of
    |dW|^2 (2 s gap at most): more than is allowed of values that float32 hardly tells apart.
    """
    found = within(basis, image)
    s, after = float(found.s[rank - 1]), float(found.s[rank])
    if s > 0 and (s - after) / s * float(found.s.square().sum()) < TIED * s**2:
        return within(basis, step.to(torch.float64).times(basis))
    return found


def _hopeless(s: Tensor, rank: int, limit: float, previous: float, left: int) -> bool:
    """Whether the bound will not be reached: a step shrinks errors by the ratio of the last column's singular value to
    the last wanted one's at best, and by what it has just shrunk them where it did."""
    if float(s[rank - 1]) <= 0:
        return False
    best = float(s[-1] / s[rank - 1])
    rate = max(best, limit / previous if limit < 0.1 and previous < 0.1 else 0.0)
    return rate >= 1 or limit * rate ** max(left, 0) > TOLERANCE


def _begin(change: Change, columns: int, seed: int, start: Tensor | None) -> Tensor:
    """The first basis: a start's rows with a little noise, and random columns; all random where none fits."""
    size = change.shape[1]
    noise = torch.randn(columns, size, generator=stream(seed, "subspace")).div_(math.sqrt(size))
    if start is None or start.shape[1] != size or not math.isfinite(float(linalg.vector_norm(start))):
        return noise.T
    given = start[:columns].float()
    noise[: len(given)] *= NOISE
    noise[: len(given)] += given / linalg.vector_norm(given, dim=1, keepdim=True).clamp_min(1e-30)
    return noise.T


def filtered(squares: Tensor, rank: int, seed: int) -> Tensor | None:
    """Leading eigenvectors (n, ``width(rank)``) of a positive matrix, float32: what ``iterate`` finds too flat, and
    where few are wanted cheaper than all; None where they are not found within ``FILTERS``.

    A product with a Chebyshev polynomial of the matrix, which is at most 1 on [0, c] and grows as fast as one can above
    it, takes the place of a product with the matrix; c is the smallest Rayleigh quotient of the columns. Its degree is
    the largest that does not drive columns more than ``GROWTH`` apart. Of the matrix dW dW^T a vector with the residual
    e and the quotient q loses e^2 / (q - t) of |dW|^2 (t as in ``bound``). Zhou and Saad, SIAM J. Matrix Anal. Appl. 29
    (2007).
    """
    columns = width(rank)
    size = float(squares.diagonal().sum(dtype=torch.float64))
    if not SQUARES[0] < math.sqrt(max(size, 0.0)) < SQUARES[1]:
        return None
    basis = squares @ torch.randn(len(squares), columns, generator=stream(seed, "filtered"))
    for _ in range(FILTERS):
        basis = orthonormal(basis.double())[0].float()
        image = squares @ basis
        quotients, turn = linalg.eigh((basis.T @ image).double())
        basis, image = (basis.double() @ turn).float(), (image.double() @ turn).float()
        missed = (image - basis * quotients.float()).square().sum(0).double()[-rank:]
        cut, largest, t = float(quotients[0]), float(quotients[-1]), quotients[(columns - rank) * 3 // 4]
        if float((missed / (quotients[-rank:] - t).clamp_min(0)).sum()) <= (TOLERANCE / 2) ** 2 * size:
            return basis
        if not cut > ROUNDING * largest:
            return None
        degree = int(math.acosh(GROWTH) / math.acosh(2 * largest / cut - 1)) if largest > cut else 1
        before, basis = basis, image / (cut / 2) - basis
        for _ in range(degree - 1):
            before, basis = basis, torch.addmm(before, squares, basis, beta=-1, alpha=4 / cut).sub_(basis, alpha=2)
    return None
