"""What a site lets be done and lets out: checked before work, during it, and before a reply leaves."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from fedlora.adapters.algebra import FACTORS
from fedlora.errors import UserError
from fedlora.federation.algorithm import Algorithm, Reply
from fedlora.federation.client import Executor, Job
from fedlora.federation.orders import Fit, Order
from fedlora.federation.spec import Extras, Tree
from fedlora.federation.wire import frame_size
from fedlora.sites.settings import UPLOADS, Allowed
from fedlora.study.config import RunConfig

log = logging.getLogger(__name__)
_WHOLE = ("head", "norm", "embedding", "backbone")
_CHANGES = (*FACTORS, "sparse")  # of a layer, or of a head's own small adapter


class Refused(Exception):
    """What a site's own limits forbid."""


def kind_of(name: str) -> str:
    """Which of ``UPLOADS`` an array is by its name.

    >>> [kind_of(name) for name in ("layer.0.q/A", "q/B:left", "head/weight", "backbone/conv.weight", "rows")]
    ['adapter', 'adapter', 'head', 'backbone', 'statistics']
    >>> [kind_of(name) for name in ("q/sparse", "extra/A", "extra/share")]  # SLoRA's, pFedLoRA's, label shares
    ['adapter', 'adapter', 'statistics']
    """
    plain = name.split(":", 1)[0]
    first, last = plain.partition("/")[0], plain.rpartition("/")[2]
    if first in _WHOLE:
        return first
    return "adapter" if "/" in plain and last in _CHANGES else "statistics"


def with_own_algorithm(allow: Allowed, config: RunConfig) -> RunConfig:
    """The run file with a site's own copy of an algorithm's file, found by file name and class among those allowed: a
    path that a server names is never read."""
    name = config.algorithm.name
    if ".py:" not in name:
        return config
    known = () if isinstance(allow.algorithms, str) else allow.algorithms
    own = next((one for one in known if PurePath(one).name == PurePath(name).name), None)
    if own is None:
        file = PurePath(name).name
        raise UserError(
            f"algorithm {file!r} is not allowed here ([allow] algorithms: {_listed(allow)})",
            f"read the file, put it beside site.toml, and list it: algorithms = [{file!r}]",
        )
    return config.replace(algorithm={"name": own})


def _listed(allow: Allowed) -> str:
    names = allow.algorithms
    return "the built-in ones" if isinstance(names, str) else ", ".join(PurePath(one).name for one in names) or "none"


def permitted(allow: Allowed, config: RunConfig, algorithm: Algorithm[Any, Any, Any]) -> str | None:
    """Why a run is beyond what the site allows, or None; said before anything is loaded or trained."""
    name = config.algorithm.name
    known = allow.algorithms == "built-in" and ".py:" not in name
    if not known and (allow.algorithms == "built-in" or name not in allow.algorithms):
        return f"algorithm {name!r} is not allowed here ([allow] algorithms: {_listed(allow)})"
    if not algorithm.federated:
        return f"algorithm {name!r} needs all data in one place"
    if config.training.rounds > allow.rounds:
        return f"a run of {config.training.rounds} rounds; [allow] rounds = {allow.rounds}"
    extras = getattr(algorithm, "extras", Extras())
    shared = [kind for kind in _WHOLE if extras.treatment(f"{kind}/") == "share"]
    if forbidden := [kind for kind in shared if kind not in allow.upload]:
        return f"it would send {', '.join(forbidden)}; [allow] upload has {', '.join(allow.upload) or 'nothing'}"
    return None


def steps_of(order: Order, examples: int) -> int:
    """Optimiser steps of an order on so many examples; 0 for what does not train.

    >>> steps_of(Fit({}, (), epochs=3, batch_size=8), 20)
    9
    """
    if not isinstance(order, Fit):
        return 0
    return order.steps or (order.epochs or 0) * math.ceil(examples / order.batch_size)


@dataclass(eq=False)
class Budget:
    """What one request may still cost. ``charge`` and ``check`` raise Refused when it is spent."""

    allow: Allowed
    clock: Callable[[], float] = time.monotonic
    steps: int = 0
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()

    def charge(self, order: Order, examples: int) -> None:
        """Counts an order's steps before it is carried out."""
        wanted = self.steps + steps_of(order, examples)
        if wanted > self.allow.steps:
            raise Refused(f"the request asks for {wanted} steps; [allow] steps = {self.allow.steps}")
        self.steps = wanted

    def check(self) -> None:
        """The time that has passed."""
        if (passed := self.clock() - self.began) > self.allow.seconds:
            raise Refused(f"the request has taken {passed:.0f} s; [allow] seconds = {self.allow.seconds:g}")


@dataclass(eq=False)
class Guarded:
    """An executor that stays within a site's limits. A job beyond them has ``Refused`` as its result, so its client is
    lost like one that failed, and the others go on.

    ``begin(client)`` starts a request's budget; ``examples(client)`` are its training examples; ``abandon`` drops what
    the inner executor still holds when nobody waits for it.
    """

    inner: Executor
    allow: Allowed
    examples: Callable[[str], int]
    abandon: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    budgets: dict[str, Budget] = field(default_factory=dict[str, Budget])
    _held: dict[int, tuple[str, int | None]] = field(default_factory=dict[int, tuple[str, "int | None"]])
    _refused: list[tuple[int, Any]] = field(default_factory=list[tuple[int, Any]])
    _count: int = 0

    def begin(self, client: str) -> None:
        """A new request of a client."""
        self.budgets[client] = Budget(self.allow, self.clock)

    def submit(self, job: Job) -> int:
        self._count += 1
        budget = self.budgets.setdefault(job.client, Budget(self.allow, self.clock))
        try:
            budget.check()
            budget.charge(job.order, self.examples(job.client))
        except Refused as refusal:
            self._refused.append((self._count, refusal))
            return self._count
        self._held[self._count] = (job.client, self.inner.submit(job))
        return self._count

    @property
    def idle(self) -> bool:
        return not self._held and not self._refused

    def advance(self) -> list[tuple[int, Any | Exception]]:
        done, self._refused = self._refused, []
        if self._held and not done:
            results = dict(self.inner.advance())
            done = [(mine, results[its]) for mine, (_, its) in self._held.items() if its in results]
        for ticket, _ in done:
            self._held.pop(ticket, None)
        return done + self._late()

    def _late(self) -> list[tuple[int, Any]]:
        """Refusals of all that is still held by clients whose time is over."""
        late: list[tuple[int, Any]] = []
        for ticket, (client, _) in list(self._held.items()):
            try:
                self.budgets[client].check()
            except Refused as refusal:
                late.append((ticket, refusal))
                del self._held[ticket]
        if late and not self._held:
            self.abandon()
        return late


def outgoing(allow: Allowed, reply: Reply) -> str | None:
    """Why a reply must not leave, or None."""
    if reply.update is None:
        return None  # scores: a few sums
    arrays: Tree = reply.update.arrays
    kinds = sorted({kind_of(name) for name in arrays}, key=UPLOADS.index)
    if forbidden := [kind for kind in kinds if kind not in allow.upload]:
        return f"the reply holds {', '.join(forbidden)}; [allow] upload has {', '.join(allow.upload) or 'nothing'}"
    if (count := frame_size(arrays)) > allow.bytes:
        return f"the reply has {count:,} bytes; [allow] bytes = {allow.bytes:,}"
    return None


def leaving(site: str, reply: Reply) -> str:
    """One line that says what leaves: kinds, counts and bytes, never data or labels.

    >>> from fedlora.federation.algorithm import Update
    >>> import torch
    >>> update = Update({"q/A": torch.zeros(2, 8), "q/B": torch.zeros(4, 2), "head/bias": torch.zeros(3)}, 12.0, {})
    >>> leaving("north", Reply("run", "train", 3, update))
    'north, round 3, train: 2 adapter (24 numbers), 1 head (3 numbers), weight 12, 0 sums; 388 bytes'
    """
    place = f"{site}, round {reply.round}, {reply.kind}"
    if reply.update is None:
        sums = sum(len(one) for one in (reply.sums or {}).values())
        return f"{place}: {sums} sums"
    groups: dict[str, list[int]] = {}
    for name, value in reply.update.arrays.items():
        groups.setdefault(kind_of(name), []).append(value.numel())
    shown = [f"{len(found)} {kind} ({sum(found):,} numbers)" for kind, found in sorted(groups.items())]
    rest = f"weight {reply.update.weight:g}, {len(reply.update.sums)} sums"
    return f"{place}: {', '.join([*shown, rest])}; {frame_size(reply.update.arrays):,} bytes"
