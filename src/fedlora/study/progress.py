"""Progress bars: rounds, and the clients of the round under way. Silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fedlora.federation.algorithm import Reply
from fedlora.federation.exchange import Asked, Exchange, Fleet, Partial, Sharded
from fedlora.federation.spec import Client


class Progress:
    """What a run shows while it goes on; ``wanted`` only counts on a terminal."""

    def __init__(self, total: int, wanted: bool) -> None:
        console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not (wanted and sys.stderr.isatty()),
            transient=True,
        )
        self._rounds = self._bars.add_task("rounds", total=total)
        self._clients = self._bars.add_task("clients", total=None, visible=False)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def over(self, fleet: Fleet | Sharded) -> Fleet | Sharded:
        """The fleet, watched."""
        return WatchedShards(fleet, self) if isinstance(fleet, Sharded) else Watched(fleet, self)

    def asked(self, clients: int) -> None:
        """So many clients are asked."""
        self._bars.reset(self._clients, total=clients, visible=True, description="  clients")

    def answered(self, clients: int = 1) -> None:
        """So many more have answered, or are lost."""
        self._bars.advance(self._clients, clients)

    def done(self, line: Mapping[str, Any]) -> None:
        """A round is finished."""
        loss = "" if line["loss"] is None else f"  loss {line['loss']:.3f}"
        self._bars.update(self._rounds, completed=line["round"], description=f"round {line['round']}{loss}")

    def warn(self, text: str) -> None:
        """What a user should know before the first round, above the bars."""
        if not self._bars.disable:
            self._bars.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)

    def say(self, text: str) -> None:
        """What happens after the last round."""
        self._bars.update(self._clients, description=f"  {text}", visible=True)


@dataclass(frozen=True, eq=False)
class Watched:
    """A fleet whose replies are counted."""

    fleet: Fleet
    progress: Progress

    def available(self, round: int) -> Sequence[Client]:
        """As the fleet says."""
        return self.fleet.available(round)

    def ask(self, requests: Asked) -> Iterator[tuple[str, Reply | None]]:
        """As the fleet answers, counted."""
        self.progress.asked(len(requests))
        for answer in self.fleet.ask(requests):
            self.progress.answered()
            yield answer


@dataclass(frozen=True, eq=False)
class WatchedShards:
    """Clients that are folded where they are, counted shard by shard."""

    fleet: Sharded
    progress: Progress

    def available(self, round: int) -> Sequence[Client]:
        """As the fleet says."""
        return self.fleet.available(round)

    def partials(self, exchange: Exchange, shards: Sequence[Sequence[Client]]) -> Iterator[Partial]:
        """As the fleet folds, counted."""
        self.progress.asked(sum(map(len, shards)))
        for shard, partial in zip(shards, self.fleet.partials(exchange, shards), strict=True):
            self.progress.answered(len(shard))
            yield partial
