"""What the loop of a run needs of whoever holds the clients: one process with all of them, or a server of sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedlora.federation.admission import Limits
from fedlora.federation.algorithm import Algorithm
from fedlora.federation.exchange import Fleet, Sharded
from fedlora.federation.orders import Model
from fedlora.federation.sampling import Sampler
from fedlora.federation.spec import Client, ModelSpec, Sums
from fedlora.learning.backbone import Backbone
from fedlora.study.config import RunConfig
from fedlora.study.summary import Metric

Deploy = Callable[[str, Mapping[str, Model], Mapping[str, Sums]], None]
"""Told a client's models that were scored, the deployed one first, and their sums."""


class Durable(Fleet, Protocol):
    """A fleet whose clients have memories."""

    def flush(self) -> None:
        """Makes them durable: before a checkpoint is saved."""
        ...


class DurableShards(Sharded, Protocol):
    """The same, of clients that are folded where they are."""

    def flush(self) -> None:
        """Makes their memories durable: before a checkpoint is saved."""
        ...


class Adapters(Protocol):
    """Writes what clients would deploy, while they are scored."""

    def __call__(self, client: str, models: Mapping[str, Model], sums: Mapping[str, Sums]) -> None: ...

    def on_everyone(self) -> dict[str, float | None]:
        """Each deployed model's score on everybody's test data, where that was asked for."""
        ...


class Writes(Protocol):
    """What writing a deployed model as a folder needs."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def spec(self) -> ModelSpec: ...
    @property
    def metric(self) -> Metric: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def backbones(self) -> Mapping[str, Backbone]: ...


class Host(Writes, Protocol):
    """A run, ready to start."""

    @property
    def folder(self) -> Path: ...
    @property
    def algorithm(self) -> Algorithm[Any, Any, Any]: ...
    @property
    def fleet(self) -> Durable | DurableShards: ...
    @property
    def shard(self) -> int | None:
        """How many clients are folded apart from the others; None: all at once."""
        ...

    @property
    def run_id(self) -> str: ...
    @property
    def sampler(self) -> Sampler: ...
    @property
    def judged(self) -> tuple[Client, ...]:
        """The clients that are scored."""
        ...

    @property
    def strangers(self) -> tuple[Client, ...]:
        """Clients that never train."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a checkpoint belongs to: "population" (the data's hash), "ranks" (the largest served, by site)."""
        ...

    @property
    def limits(self) -> Limits | None:
        """What no honest participant exceeds; None: they are all our own."""
        ...

    @property
    def class_prior(self) -> Mapping[str, Any] | None:
        """What answering with each client's most frequent label scores; None where there are no classes."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know of the data beside the scores."""
        ...

    def spent(self) -> tuple[int, Mapping[str, float]]:
        """Client-steps so far, and floating-point operations by client."""
        ...

    def observed(self) -> Mapping[str, Any]:
        """What else the round's line should tell."""
        ...

    def evaluate(
        self, checkpoint: Mapping[str, Any], clients: Iterable[Client], deploy: Any = None
    ) -> dict[str, dict[str, Sums]]:
        """Sums on the test data by client and variant, the deployed one first; ``deploy``: what ``adapters`` gave."""
        ...

    def adapters(self) -> Adapters:
        """A fresh writer."""
        ...
