"""What a federated run does, for whoever sits before it: read from the files that its server writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedlora.engines.flower.server_app import EVENTS


@dataclass(eq=False)
class Tail:
    """The lines that are added to a file."""

    file: Path
    place: int = 0

    def __post_init__(self) -> None:
        self.place = self.file.stat().st_size if self.file.exists() else 0

    def lines(self) -> Iterator[dict[str, Any]]:
        """Those that are new and whole. A file that was replaced by a shorter one is read from its start."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            if file.seek(0, 2) < self.place:
                self.place = 0
            file.seek(self.place)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.place += len(line)
                yield json.loads(line)


@dataclass(eq=False)
class Watch:
    """Bars of rounds and clients on a terminal, a line for every round and event elsewhere; silent if not wanted."""

    folder: Path
    rounds: int
    wanted: bool
    round: int = -1
    tails: dict[str, Tail] = field(default_factory=dict[str, Tail])

    def __enter__(self) -> Watch:
        self.tails = {name: Tail(self.folder / name) for name in (EVENTS, "metrics.jsonl")}
        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not (self.wanted and sys.stderr.isatty()),
            transient=True,
        )
        self.bar = self.bars.add_task("sites are starting", total=self.rounds)
        self.clients = self.bars.add_task("  clients", total=None, visible=False)
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.look()
        self.bars.stop()

    def say(self, text: str) -> None:
        """A line."""
        if self.wanted:
            self.console.print(text, markup=False, highlight=False)

    def look(self) -> None:
        """Shows what is new."""
        for event in self.tails[EVENTS].lines():
            self._event(event)
        for line in self.tails["metrics.jsonl"].lines():
            self.round = max(self.round, int(line["round"]))
            loss = "" if line["loss"] is None else f"  loss {line['loss']:.3f}"
            self.bars.update(self.bar, completed=self.round, description=f"round {self.round}{loss}")
            lost = f", lost: {', '.join(line['lost'])}" if line["lost"] else ""
            sent = line["bytes"]["up"] + line["bytes"]["down"]
            if line["participants"] or lost:
                self.say(
                    f"round {self.round}/{self.rounds}{loss}  {line['participants']} clients{lost}, "
                    f"{sent / 1e6:.2f} MB, {line['seconds']:.1f} s"
                )

    def _event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "asked":
            self.bars.reset(self.clients, total=event["clients"], visible=True, description="  clients")
        elif kind == "answered":
            self.bars.advance(self.clients)
            if event["problem"]:
                self.say(f"{event['client']}: {event['problem']}")
        elif kind == "joined":
            self.say(f"{event['site']} is there with {event['clients']} clients")
        elif kind == "refused":
            self.say(f"{event['site']} does not take part: {event['reason']}")
        elif kind == "silent":
            self.say(f"{event['site']} is left behind at the deadline of round {event['round']}")
