"""Progress bars around a fleet: rounds, and the clients of the round under way. Silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fedlora.federation.algorithm import Reply
from fedlora.federation.rounds import Asked, Fleet
from fedlora.federation.spec import Client


class Progress:
    """A fleet that passes everything on and shows it; ``wanted`` only counts on a terminal."""

    def __init__(self, fleet: Fleet, total: int, wanted: bool) -> None:
        self._fleet = fleet
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

    def available(self, round: int) -> Sequence[Client]:
        """As the fleet says."""
        return self._fleet.available(round)

    def ask(self, requests: Asked) -> Iterator[tuple[str, Reply | None]]:
        """As the fleet answers, counted."""
        self._bars.reset(self._clients, total=len(requests), visible=True, description="  clients")
        for answer in self._fleet.ask(requests):
            self._bars.advance(self._clients)
            yield answer

    def done(self, line: Mapping[str, Any]) -> None:
        """A round is finished."""
        loss = "" if line["loss"] is None else f"  loss {line['loss']:.3f}"
        self._bars.update(self._rounds, completed=line["round"], description=f"round {line['round']}{loss}")

    def say(self, text: str) -> None:
        """What happens after the last round."""
        self._bars.update(self._clients, description=f"  {text}", visible=True)
