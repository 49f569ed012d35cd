"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedlora.errors import UserError
from fedlora.federation.spec import Client, stream

Sampler = Callable[[Sequence[Client], int, int], Sequence[Client]]
"""(available clients, round, seed) -> the cohort."""


def cohort(clients: Sequence[Client], round: int, seed: int, count: int | float | None = None) -> list[Client]:
    """A cohort, sorted by id: a pure function of (seed, round) and who is there.

    ``count``: so many (at most all), a share (a float up to 1; at least one client), or None for everyone.

    >>> clients = [Client(name, {}) for name in "abcde"]
    >>> len(cohort(clients, 1, 0, 2)), len(cohort(clients, 1, 0, 0.5)), len(cohort(clients, 1, 0))
    (2, 3, 5)
    >>> cohort(clients, 1, 0, 2) == cohort(clients[::-1], 1, 0, 2)
    True
    """
    if count is not None and not (0 < count <= 1 if isinstance(count, float) else count >= 1):
        raise UserError(f"a cohort of {count} clients", "give a whole number from 1, or a share above 0 and up to 1.0")
    everyone = sorted(clients, key=lambda client: client.id)
    if count is None or not everyone:
        return everyone
    order = torch.randperm(len(everyone), generator=stream(seed, "cohort", round))
    return [everyone[int(index)] for index in order[: size(count, len(everyone))].sort().values]


def size(count: int | float | None, clients: int) -> int:
    """How many of so many clients a cohort is.

    >>> size(None, 7), size(3, 7), size(30, 7), size(0.5, 7), size(0.01, 7)
    (7, 3, 7, 4, 1)
    """
    if count is None:
        return clients
    return max(1, int(count * clients + 0.5)) if isinstance(count, float) else min(count, clients)


@dataclass(frozen=True)
class Cohorts:
    """A sampler of cohorts of one size."""

    count: int | float | None = None

    def __call__(self, clients: Sequence[Client], round: int, seed: int) -> list[Client]:
        return cohort(clients, round, seed, self.count)
