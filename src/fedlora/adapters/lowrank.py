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
3. ``flat``: the eigenvectors of dW dW^T in float32, for what the iteration has found too flat; checked by residuals.
4. The same in float64 (``gram``), whose squares lose nothing that matters: directions below 1e-8 of the largest.

Where the factors' rank is below half the smaller side, 3 and 4 work on their core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from fedlora.adapters.algebra import factors, linalg
from fedlora.federation.spec import Tree, stream

DEAD = 1e-10  # singular values below this share of the largest are rounding
TOLERANCE = 7e-6  # of the computed bound: float32 itself takes a part of the 1e-5
STEPS = 16  # products that the iteration may take; by then the Gram matrix is cheaper
SMALL = 256  # smaller sides up to this one are decomposed densely
BLOCK = 512  # rows at a time where the whole would only be summed: large fresh memory costs more than the products
DOUBT = 16.0  # how much larger than its residual a direction may be that hides in an unresolved column
FLAT = 1e-2  # share of |dW|^2 above which |dW|^2 - |S|^2 still has its digits in float32
CANCELS = 1e-2  # share of |dW| below which Gram matrices of factors say little of it in float32
ROUGH = 4  # products in bfloat16 that come first
LEVEL = 1e-3  # share of the largest diagonal entry of a triangle above which one Cholesky leaves 1e-10 of angles
NOISE = 1e-2  # share of every start's vector that is random: no start is blind to a direction


@dataclass(frozen=True)
class Change:
    """dW (out, in) as ``left @ right``, or as ``left`` itself.

    >>> change = Change(torch.ones(3, 1), torch.ones(1, 2))
    >>> change.shape, change.times(torch.ones(2, 1)).flatten(), change.transposed.shape
    ((3, 2), tensor([2., 2., 2.]), (2, 3))
    """

    left: Tensor
    right: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    @property
    def inner(self) -> int:
        """No more singular values than this differ from zero."""
        return min(*self.shape, self.left.shape[1])

    @property
    def transposed(self) -> Change:
        return Change(self.left.T) if self.right is None else Change(self.right.T, self.left.T)

    def times(self, columns: Tensor) -> Tensor:
        """dW @ columns."""
        return self.left @ (columns if self.right is None else self.right @ columns)

    def product(self) -> Tensor:
        return self.left if self.right is None else self.left @ self.right

    def to(self, dtype: torch.dtype) -> Change:
        return Change(self.left.to(dtype), None if self.right is None else self.right.to(dtype))

    def norm(self) -> float:
        """The Frobenius norm; by the factors' Gram matrices."""
        if self.right is None:
            return float(linalg.vector_norm(self.left, dtype=torch.float64))
        grams = (self.left.T @ self.left).double() * (self.right @ self.right.T)
        return math.sqrt(max(0.0, float(grams.sum())))


@dataclass(frozen=True)
class Leading:
    """Leading singular triplets: u (out, k), s (k,) falling, v (in, k), float64; and the norm of what they leave."""

    u: Tensor
    s: Tensor
    v: Tensor
    rest: float = math.nan

    @property
    def swapped(self) -> Leading:
        """Those of the transposed."""
        return replace(self, u=self.v, v=self.u)


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
        return _svd(change.product())
    (left, upper), (right, lower) = _qr(change.left), _qr(change.right.T)
    u, s, vt = _svd(upper @ lower.T)
    return left @ u, s, vt @ right.T


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    q, r = linalg.qr(matrix)
    return q, r


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = linalg.svd(matrix, full_matrices=False)
    return u, s, vt


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
    return torch.cat([rows, _qr(draw.T)[0].T])


# -- the choice, and its ways


def leading(change: Change, rank: int, seed: int, start: Tensor | None = None) -> Leading:
    """The leading ``rank`` triplets, by the first of the module's ways that fits."""
    if min(change.shape) > SMALL and 4 * width(rank) <= change.inner:
        small = change.to(torch.float32)
        if small.right is not None and small.left.numel() + small.right.numel() >= math.prod(small.shape):
            small = Change(small.product())
        found = iterate(small, rank, seed, start) or flat(small, rank)
        if found is not None:
            return found
    wide = change.to(torch.float64)
    if min(wide.shape) <= SMALL:
        u, s, vt = _exact(wide)
        return Leading(u[:, :rank], s[:rank], vt[:rank].T, float(linalg.vector_norm(s[rank:])))
    if wide.right is None or 2 * wide.left.shape[1] >= min(wide.shape):
        return gram(wide.product(), rank)
    (left, upper), (right, lower) = _orthonormal(wide.left), _orthonormal(wide.right.T)
    found = gram(upper @ lower.T, min(rank, len(upper)))
    return replace(found, u=left @ found.u, v=right @ found.v)


def flat(change: Change, rank: int) -> Leading | None:
    """By the eigenvectors of dW dW^T in float32, some more than are wanted; None where that is not enough.

    One step in float64 makes triplets of them: ``dW^T u_i = s_i v_i`` exactly, and ``e_i = |dW v_i - s_i u_i|`` is
    measured. A wanted direction that is off by an angle of theta towards one outside, of singular value at most t, has
    e = theta (s^2 - t^2) / s and loses theta^2 (s^2 - t^2) of |dW|^2: that is ``e_i^2 s_i^2 / (s_i^2 - t^2)``, which
    must stay below the tolerance. t is the value a quarter into the columns beyond the wanted ones, as in ``bound``.

    Of factors with few columns, with L = Q T, the core T R R^T T^T has the squares, and Q x = L T^-1 x.
    """
    if change.shape[0] > change.shape[1]:
        found = flat(change.transposed, rank)
        return found and found.swapped
    upper = None
    if change.right is None or 2 * change.left.shape[1] >= min(change.shape):
        squares = _squares(change.product())
    else:
        upper, failed = linalg.cholesky_ex(_squares(change.left.T), upper=True)
        if int(failed):
            return None
        squares = upper @ _squares(change.right) @ upper.T
    if not bool(squares.isfinite().all()):  # squares of what float32 still holds
        return None
    vectors = linalg.eigh(squares)[1][:, -width(rank) :]
    if upper is not None:
        vectors = change.left @ linalg.solve_triangular(upper, vectors, upper=True)
    u, _ = _orthonormal(vectors.double())
    right, core = _orthonormal(change.transposed.times(u.float()).double())
    inner, s, vt = _svd(core.T)
    u, v = u @ inner, right @ vt.T
    missed = (change.times(v.float()).double() - u * s).square().sum(0)[:rank]
    every, size = s**2, float(squares.diagonal().sum(dtype=torch.float64))
    gap = every[:rank] - every[rank + (len(every) - rank) // 4]
    if not float((missed * every[:rank] / gap.clamp_min(0)).sum()) <= TOLERANCE**2 * size:
        return None
    rest = max(0.0, size - float(every[:rank].sum()))
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    return Leading(u, s, v, math.sqrt(rest)) if rest > FLAT * size else _first(change, u, s, v)


def _squares(matrix: Tensor) -> Tensor:
    """M M^T, of which the part below the diagonal blocks is not computed twice."""
    half = len(matrix) // 2
    first, second = matrix[:half], matrix[half:]
    out = matrix.new_empty(len(matrix), len(matrix))
    torch.mm(first, first.T, out=out[:half, :half])
    torch.mm(second, second.T, out=out[half:, half:])
    torch.mm(first, second.T, out=out[:half, half:])
    out[half:, :half] = out[:half, half:].T
    return out


def gram(matrix: Tensor, rank: int) -> Leading:
    """By the eigenvectors U_r of dW dW^T (or of dW^T dW, the smaller): dW = U_r (U_r^T dW) + rest, and the small side's
    SVD makes it triplets, orthonormal also where singular values are too small for their squares."""
    if matrix.shape[0] > matrix.shape[1]:
        return gram(matrix.T, rank).swapped
    values, vectors = linalg.eigh(_squares(matrix))
    u = vectors[:, -rank:]
    right, core = _qr(matrix.T @ u)
    inner, s, vt = _svd(core.T)
    rest = math.sqrt(float(values[:-rank].clamp_min(0).sum())) if rank < len(values) else 0.0
    return Leading(u @ inner, s, right @ vt.T, rest)


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
        partner, core = _orthonormal(image)
        inner, s, vt = _svd(core)
        found = Leading(partner @ inner, s, basis @ vt.T)
        if limit <= TOLERANCE:
            found = found.swapped if turned else found
            return _first(change, found.u[:, :rank], s[:rank], found.v[:, :rank])
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
            image = step.times(_orthonormal(columns.float())[0].to(step.left.dtype))
            if not bool(image.isfinite().all()):  # what float32 still holds
                break
            columns, turned = image, not turned
    return _orthonormal(columns.double())[0], turned


@cache
def halves_are_fast() -> bool:
    """Whether this processor has instructions for products in bfloat16."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def _first(change: Change, u: Tensor, s: Tensor, v: Tensor) -> Leading:
    """The triplets with the norm of the rest, computed from the rest: |dW|^2 - |S|^2 has three digits in float32."""
    if change.right is None:
        rows = zip(torch.split(change.left, BLOCK), torch.split((u * s).float(), BLOCK), strict=True)
        norms = torch.cat([linalg.vector_norm(row - mine @ v.T.float(), dim=1) for row, mine in rows])
        return Leading(u, s, v, float(linalg.vector_norm(norms.double())))
    kept = v.float()
    rest = Change(change.left, torch.addmm(change.right, change.right @ kept, kept.T, alpha=-1))
    size = rest.norm()
    if size < CANCELS * float(linalg.vector_norm(s)):
        size = rest.to(torch.float64).norm()
    return Leading(u, s, v, size)


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
    noise = torch.randn(size, columns, generator=stream(seed, "subspace"), dtype=torch.float32).double()
    noise = noise / math.sqrt(size)
    if start is None or start.shape[1] != size or not bool(torch.isfinite(start).all()):
        return noise
    given = start[:columns].T.double()
    given = given / linalg.vector_norm(given, dim=0).clamp_min(1e-30)
    return torch.cat([given + NOISE * noise[:, : given.shape[1]], noise[:, given.shape[1] :]], 1)


def _orthonormal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q and T with matrix = Q T, Q^T Q = 1: Cholesky, which is all products, twice where once leaves more than rounding
    of float32, and QR where that is too steep."""
    q, core = matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype)
    for _ in range(2):
        upper, failed = linalg.cholesky_ex(q.T @ q, upper=True)
        steep = float(upper.diagonal().min()) / max(float(upper.diagonal().max()), 1e-300)
        if int(failed) or not steep > 1e-7:
            return _qr(matrix)
        q = linalg.solve_triangular(upper, q, upper=True, left=False)
        core = upper @ core
        if steep > LEVEL:
            break
    return q, core
