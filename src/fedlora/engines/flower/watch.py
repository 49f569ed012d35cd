"""What a federated run does, for whoever sits before it: read from the files that its server writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedlora.engines.flower.server_app import EVENTS
from fedlora.errors import UserError
from fedlora.study import folder as files

if TYPE_CHECKING:
    from fedlora.engines.flower.metrics import Metrics


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
    """Bars of rounds and clients on a terminal, a line for every round and event elsewhere; silent if not wanted.
    ``metrics`` are told what is read, wanted or not, the rounds that were done before included."""

    folder: Path
    rounds: int
    wanted: bool
    metrics: Metrics | None = None
    round: int = -1
    tails: dict[str, Tail] = field(default_factory=dict[str, Tail])

    def __enter__(self) -> Watch:
        self.tails = {name: Tail(self.folder / name) for name in (EVENTS, "metrics.jsonl")}
        if self.metrics is not None:
            for line in files.lines(self.folder / "metrics.jsonl"):
                self.metrics.line(line)
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
            if self.metrics is not None:
                self.metrics.event(event)
        for line in self.tails["metrics.jsonl"].lines():
            if self.metrics is not None:
                self.metrics.line(line)
            self.round = max(self.round, int(line["round"]))
            loss = "" if line["loss"] is None else f"  loss {line['loss']:.3f}"
            self.bars.update(self.bar, completed=self.round, description=f"round {self.round}{loss}")
            lost = f", lost: {', '.join(line['lost'])}" if line["lost"] else ""
            dropped = [f"{name}: {reason}" for name, reason in line["rejected"].items()]
            lost += f", update dropped of {'; '.join(dropped)}" if dropped else ""
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


@contextmanager
def watched(folder: Path, rounds: int, progress: bool, metrics: tuple[str, int] | None) -> Iterator[Watch]:
    """Whoever sits before the run: a person, and Prometheus where it may ask."""
    if metrics is None:
        with Watch(folder, rounds, progress) as watch:
            yield watch
        return
    from fedlora.engines.flower.metrics import Metrics, served

    told, (host, port) = Metrics(rounds), metrics
    with served(told, host, port) as port, Watch(folder, rounds, progress, told) as watch:
        watch.say(f"metrics at http://{host}:{port}/metrics")
        yield watch


def require_prometheus(wanted: object) -> None:
    """Refuses to begin without the library that answers Prometheus."""
    if wanted is not None and importlib.util.find_spec("prometheus_client") is None:
        raise UserError("--metrics-port: prometheus_client is not installed", "pip install 'fedlora[prometheus]'")
