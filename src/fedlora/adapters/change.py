"""A change dW of one site as a matrix: its products, its norm, its leading singular triplets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.adapters.algebra import linalg

BLOCK = 512  # rows at a time where the whole would only be summed: large fresh memory costs more than the products
DIGITS = 1e-4  # share of |dW|^2 above which |dW|^2 - |S|^2 has three digits in float32
SQUARES = (1e-12, 1e12)  # norms of matrices whose squares float32 holds
CANCELS = 1e-2  # share of |dW| below which Gram matrices of factors say little of it in float32
LEVEL = 1e-3  # share of the largest diagonal entry of a triangle above which one Cholesky leaves 1e-10 of angles


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
            rows = float(linalg.vector_norm(linalg.vector_norm(self.left, dim=1).double()))
            if SQUARES[0] < rows < SQUARES[1]:  # 30 times as fast as float64 throughout
                return rows
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


def with_rest(change: Change, u: Tensor, s: Tensor, v: Tensor, squared: float | None = None) -> Leading:
    """The triplets with the norm of the rest: |dW|^2 (``squared``) - |S|^2 where that keeps its digits, else that of
    dW - U S V^T."""
    if squared is None and change.right is None:
        squared = change.norm() ** 2
    if squared is not None and (left := squared - float(s.square().sum())) > DIGITS * squared:
        return Leading(u, s, v, math.sqrt(left))
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


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    q, r = linalg.qr(matrix)
    return q, r


def dense_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def orthonormal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q and T with matrix = Q T, Q^T Q = 1: Cholesky, which is all products, twice where once leaves more than rounding
    of float32, and QR where that is too steep."""
    q, core = matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype)
    for _ in range(2):
        upper, failed = linalg.cholesky_ex(q.T @ q, upper=True)
        steep = float(upper.diagonal().min()) / max(float(upper.diagonal().max()), 1e-300)
        if int(failed) or not steep > 1e-7:
            return qr(matrix)
        q = linalg.solve_triangular(upper, q, upper=True, left=False)
        core = upper @ core
        if steep > LEVEL:
            break
    return q, core
