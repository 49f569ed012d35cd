"""A run's numbers for Prometheus: counted from what ``Watch`` reads, the lines of metrics.jsonl and events.jsonl.

Counts and sums of the whole run only: no site, client or label has a name here, and nothing is said of data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary, start_http_server

from fedlora.errors import UserError


@dataclass(eq=False)
class Metrics:
    """Counters of one run. ``total``: its planned rounds; ``round``: the last one counted (each counts once, however
    often a server that was started again does it)."""

    total: int
    round: int = -1
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        here = {"namespace": "fedlora", "registry": self.registry}
        Gauge("rounds_planned", "Rounds of the run.", **here).set(self.total)
        self.last = Gauge("round", "The last round that is done; 0 after the introductions.", **here)
        self.seconds = Summary("round_seconds", "What rounds took, training and waiting.", **here)
        self.replies = Counter("replies", "Clients asked: replied, lost (no reply in time), refused.", ["what"], **here)
        self.bytes = Counter("bytes", "Frames: up to the server or down; of introductions.", ["way", "of"], **here)
        self.late = Counter("sites_late", "Sites left behind at a deadline.", **here)
        self.refused = Counter("sites_refused", "Sites that may not take part.", **here)
        self.joined = Counter("sites_joined", "Introductions of sites; again after an absence.", **here)
        self.loss = Gauge("train_loss", "Mean training loss of the last round that had one.", **here)
        self.score = Gauge("score", "The last scores: mean of personal models; the global one.", ["model"], **here)

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if line["round"] <= self.round:
            return
        self.round = int(line["round"])
        self.last.set(self.round)
        self.seconds.observe(line["seconds"])
        for what, count in (
            ("replied", line["participants"]),
            ("lost", len(line["lost"])),
            ("refused", len(line["rejected"])),
        ):
            self.replies.labels(what).inc(count)
        for key, count in line["bytes"].items():
            self.bytes.labels(key.removeprefix("setup_"), "setup" if key.startswith("setup_") else "rounds").inc(count)
        scores = {"personal": (line.get("personal") or {}).get("mean"), "global": line.get("global")}
        for model, score in scores.items():
            if score is not None:
                self.score.labels(model).set(score)
        if line["loss"] is not None:
            self.loss.set(line["loss"])

    def event(self, event: Mapping[str, Any]) -> None:
        """A line of events.jsonl."""
        counters = {"silent": self.late, "refused": self.refused, "joined": self.joined}
        if event["event"] in counters:
            counters[event["event"]].inc()


@contextmanager
def served(metrics: Metrics, host: str, port: int) -> Iterator[int]:
    """Answers scrapes at http://HOST:PORT/metrics meanwhile; gives the port (0: any that is free)."""
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as problem:
        raise UserError(
            f"--metrics-port {port}: cannot listen on {host}:{port}: {problem.strerror or problem}",
            "choose a port that is free, and an address of this machine",
        ) from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
