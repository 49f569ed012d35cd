"""Clients folded in shards, elsewhere and perhaps twice: what an engine of many machines does, without the machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from conformance.table import world
from conformance.test_conformance import memories, run
from conformance.toy import Fleet
from fedlora.algorithms import ALGORITHMS
from fedlora.engines.simulator import Simulator
from fedlora.federation.exchange import Exchange, Partial, fold
from fedlora.federation.memory import DiskMemory
from fedlora.federation.rounds import Report, rounds
from fedlora.federation.sampling import Cohorts
from fedlora.federation.spec import Client
from fedlora.federation.wire import decode, encode, same

every = pytest.mark.parametrize("name", sorted(ALGORITHMS))


@dataclass
class Elsewhere:
    """Every shard on a machine of its own, which has nothing but a disk that all share; what travels are frames. Shards
    in ``lost`` are done, and done again on another machine because nobody heard of it."""

    fleet: Fleet
    lost: tuple[int, ...] = ()

    def available(self, round: int) -> Sequence[Client]:
        return self.fleet.available(round)

    def machine(self) -> Simulator:
        return replace(self.fleet.inner, stores={})

    def partials(self, exchange: Exchange, shards: Sequence[Sequence[Client]]) -> Iterator[Partial]:
        frame = encode(vars(exchange))
        for number, shard in enumerate(shards):
            for _ in range(2 if number in self.lost else 1):
                asked = Exchange(**decode(frame))
                partial = fold(asked, self.fleet.algorithm, self.fleet.spec, self.machine(), shard)
            yield Partial(decode(encode(partial.acc)), partial.account)


def elsewhere(fleet: Fleet, lost: tuple[int, ...], **options: Any) -> list[Report]:
    here = Elsewhere(fleet, lost)
    return list(rounds(fleet.algorithm, fleet.spec, here, total=3, seed=fleet.inner.run_seed, **options))


@every
def test_where_shards_are_folded_does_not_matter(name: str, tmp_path: Path) -> None:
    """State, memories, sums and bytes, bit for bit; also where shards were done twice."""
    sampler = Cohorts(0.8)  # with newcomers on the way
    here = world(name)
    straight = run(here, 3, shard=2, sampler=sampler)
    there = world(name, store=lambda id: DiskMemory(tmp_path, id))
    reports = elsewhere(there, (0, 2), shard=2, sampler=sampler)
    assert same([report.checkpoint for report in reports], [report.checkpoint for report in straight])
    assert same(memories(there, reports[-1]), memories(here, straight[-1]))
    for ours, theirs in zip(reports, straight, strict=True):
        assert (ours.folded, ours.sums, ours.bytes, ours.clients) == (
            theirs.folded,
            theirs.sums,
            theirs.bytes,
            theirs.clients,
        )


@every
def test_shards_agree_with_the_whole(name: str) -> None:
    """One round: sums in another order."""
    whole, parts = (run(world(name), 1, shard=shard)[-1] for shard in (None, 3))
    assert same(parts.checkpoint, whole.checkpoint, 1e-9)
    assert parts.bytes == whole.bytes
