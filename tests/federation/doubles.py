"""The smallest algorithm, and an executor that can be slow and fail."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedlora.engines.simulator import Simulator
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Request, Update
from fedlora.federation.client import Job
from fedlora.federation.orders import Model, Score, Work
from fedlora.federation.spec import Client, Local, ModelSpec, Tree


@dataclass
class Watch:
    """How many of the watched objects were alive at most."""

    alive: list[Any] = field(default_factory=list)
    peak: int = 0

    def see(self, value: Any) -> Any:
        self.alive.append(weakref.ref(value, self.alive.remove))
        self.peak = max(self.peak, len(self.alive))
        return value


SPEC = ModelSpec({}, {}, {"head/bias": (3,)}, ("a", "b"), 2)


@dataclass(frozen=True)
class Toy(Algorithm[Tree, Tree, Tree]):
    """Every client asks for one score and sends ones."""

    payloads: Watch = field(default_factory=Watch)
    updates: Watch = field(default_factory=Watch)

    aggregator = Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        return {"head/bias": torch.zeros(3)}

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        return {"head/bias": self.payloads.see(state["head/bias"].clone())}

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        yield from Score(Model(payload), "train")
        return Update({"head/bias": self.updates.see(torch.ones(3))}, local.examples, {}), memory

    def expects(self, state: Tree, client: Client, round: int, kind: str) -> Mapping[str, Any]:
        return {"head/bias": (3,)}

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return {"head/bias": state["head/bias"] + value["head/bias"].float()}


@dataclass
class Slow:
    """An executor that finishes one job a turn, those of client ``last`` at the very end; ``failing`` ones fail."""

    last: str = ""
    failing: frozenset[str] = frozenset()
    jobs: dict[int, Job] = field(default_factory=dict)
    open: list[int] = field(default_factory=list)
    count: int = 0

    @property
    def idle(self) -> bool:
        return not self.jobs

    def submit(self, job: Job) -> int:
        self.count += 1
        self.jobs[self.count] = job
        return self.count

    def advance(self) -> list[tuple[int, Any]]:
        self.open.append(len(self.jobs))
        ticket = min(self.jobs, key=lambda t: (self.jobs[t].client == self.last, t))
        job = self.jobs.pop(ticket)
        return [(ticket, FloatingPointError("diverged") if job.client in self.failing else {"loss": (0.0, 1.0)})]


def simulator(executor: Slow, count: int, lanes: int, algorithm: Toy | None = None) -> Simulator:
    clients = {f"c{k:04d}": Client(f"c{k:04d}", {}, examples=4) for k in range(count)}
    return Simulator(algorithm or Toy(), SPEC, executor, clients, lambda id: (4, {}), 0, lanes)


def request(kind: Any, id: str) -> Any:
    return Request("run", kind, 1, 1, None, None, {"head/bias": torch.zeros(3)})
