"""Validation data that no algorithm trains on, to choose hyper-parameters and rounds by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fedlora.data.keys import stream

Splits = Mapping[str, np.ndarray]
SHARE = 8  # one in so many of the remaining training rows becomes the algorithm's own holdout


@dataclass(frozen=True)
class Validated(Mapping[str, Splits]):
    """The clients with their holdout renamed "validation", and a new, smaller holdout drawn from what they fit.

    ``holdout`` belongs to the algorithm (FDLoRA fuses on it, most train on it); whoever chooses between algorithms by
    it would choose the one that overfits. Made on access: nothing is copied for clients that nobody asks for.

    >>> rows = {"fit": np.arange(16), "holdout": np.arange(16, 18), "test": np.arange(18, 20)}
    >>> {name: len(own) for name, own in Validated({"a": rows}, seed=0)["a"].items()}
    {'fit': 14, 'holdout': 2, 'validation': 2, 'test': 2}
    """

    clients: Mapping[str, Splits]
    seed: int

    def __getitem__(self, client: str) -> Splits:
        own = self.clients[client]
        order = stream(self.seed, "validation", client).permutation(own["fit"])
        held = len(order) // SHARE
        return {
            "fit": np.sort(order[held:]),
            "holdout": np.sort(order[:held]),
            "validation": own["holdout"],
            "test": own["test"],
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)
