"""The inside of an actor: a whole experiment. Which clients it serves is said every time, so any actor may serve any.

Clients' memories lie in the run folder, which all actors share, and are durable before a result leaves; a version that
is written twice is the same twice. That makes it safe to do the work of a lost actor again.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.errors import UserError
from fedlora.federation.exchange import Exchange, fold
from fedlora.federation.wire import decode, encode
from fedlora.sites import agreement
from fedlora.study.config import parse
from fedlora.study.experiment import Experiment, assemble


@dataclass(frozen=True, eq=False)
class Start:
    """What an actor begins with. ``config``: the resolved run file; ``given``: what the run was given as objects;
    ``facts``: what all must have in common, ``data`` the hash of the examples and their split among them."""

    config: Mapping[str, Any]
    folder: str
    given: Mapping[str, Any]
    facts: Mapping[str, str]
    data: str


@dataclass(frozen=True)
class Told:
    """What an actor says of some work, apart from a large accumulator: its value (an account, or scores), steps and
    floating-point operations, and the lines for the run's log (level, logger, text)."""

    value: Any
    steps: int
    flops: Mapping[str, float]
    said: tuple[tuple[int, str, str], ...]


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """One line more."""
        self.lines.append((record.levelno, record.name, record.getMessage()))


@contextmanager
def heard() -> Iterator[Heard]:
    """What fedlora logs meanwhile."""
    handler, logger = Heard(), logging.getLogger("fedlora")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


class Worker:
    """An actor. ``token`` names what was last decoded: a round's state is unpacked once, not for every shard."""

    def __init__(self) -> None:
        self.token = ""
        self.value: Any = None
        self.experiment: Experiment | None = None

    def load(self, start: Start) -> str:
        """Loads base and data; where this actor is. UserError where it could not do the same as the others."""
        config, here = parse(start.config, "the run's configuration"), socket.gethostname()
        torch.set_num_threads(config.engine.threads)
        folder = Path(start.folder)
        if not (folder / "run.log").exists():
            raise UserError(
                f"{here}: there is no run folder {folder}",
                "all nodes need the run folder, the data and the model under the same paths: use a shared file system",
            )
        experiment = assemble(config, folder, **start.given)
        if experiment.population.digest != start.data:
            raise UserError(f"{here}: the data or its split differ from the head's", "give all nodes the same files")
        if found := agreement.differences(start.facts, agreement.facts_of(experiment)):
            raise UserError(f"{here}: {'; '.join(found)}")
        self.experiment = experiment
        return f"pid {os.getpid()} on {here}"

    def fold(self, token: str, frame: np.ndarray, names: Sequence[str]) -> tuple[Told, np.ndarray]:
        """Asks some clients what ``frame`` (an exchange) says: their account, and the frame of the accumulator."""
        exchange = Exchange(**self.decoded(token, frame))

        def work(here: Experiment) -> tuple[Any, Any]:
            clients = [here.fleet.clients[name] for name in names]
            partial = fold(exchange, here.algorithm, here.spec, here.fleet, clients)
            here.fleet.flush()
            return partial.account, (partial.acc if partial.account.folded else None)

        return self.told(work)

    def score(self, token: str, frame: np.ndarray, names: Sequence[str], write: bool) -> tuple[Told, np.ndarray]:
        """Scores some clients at a checkpoint, and (``write``) writes what they deploy: (their sums, their deployed
        models' scores on everybody's data, where that was asked for), and nothing large."""
        checkpoint = self.decoded(token, frame)

        def work(here: Experiment) -> tuple[Any, Any]:
            clients, adapters = [here.fleet.clients[name] for name in names], here.adapters()
            sums = here.evaluate(checkpoint, clients, adapters if write else None)
            return (sums, adapters.on_everyone() if write else {}), None

        return self.told(work)

    def told(self, work: Callable[[Experiment], tuple[Any, Any]]) -> tuple[Told, np.ndarray]:
        """Does work that ends in something small and something large, and says what it took."""
        here = self.experiment
        if here is None:
            raise RuntimeError("an actor is asked before it has loaded")
        steps, flops = here.spent()
        with heard() as handler:
            small, large = work(here)
        then, counts = here.spent()
        spent = {name: count - flops.get(name, 0.0) for name, count in counts.items()}
        spent = {name: count for name, count in spent.items() if count}
        return Told(small, then - steps, spent, tuple(handler.lines)), packed(large)

    def decoded(self, token: str, frame: np.ndarray) -> Any:
        """The plain value of a frame, kept until there is another."""
        if token != self.token:
            self.value = None  # two rounds' states need not be alive at once
            self.token, self.value = token, decode(frame.tobytes())
        return self.value


def packed(plain: Any) -> np.ndarray:
    """A frame as an array: Ray maps arrays into a process instead of copying them."""
    return np.frombuffer(encode(plain), dtype=np.uint8)
