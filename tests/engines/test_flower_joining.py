"""Which sites take part, what a person is told of the others, and what becomes of those that were away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from conformance.grid import HELLO, divided
from conformance.table import world
from conformance.toy import Fleet
from fedlora.engines.flower.fleet import GridFleet, Patience
from fedlora.errors import UserError
from fedlora.federation.rounds import evaluate, rounds
from fedlora.federation.spec import Client
from fedlora.sites.agreement import unsuited

QUICK = Patience(deadline=0.3, quorum=0.5, join=2.0, sites=3, poll=0.01)


@pytest.fixture
def toys() -> Fleet:
    return world("fedit", count=5)


def ranked(toys: Fleet, name: str, rank: int) -> None:
    """A client's site states another rank than the run's."""
    client = replace(toys.clients[name], ranks=dict.fromkeys(toys.spec.ranks, rank))
    toys.inner.clients = {**toys.clients, name: client}


def test_a_site_of_another_rank_is_refused_where_the_algorithm_needs_equal_ones(toys: Fleet, tmp_path: Path) -> None:
    ranked(toys, "c1", 2)  # of site-1

    def asked(clients: Sequence[Client]) -> str:
        return unsuited(toys.algorithm, toys.spec, 0, clients)

    said: list[Mapping[str, Any]] = []
    patience = replace(QUICK, sites=2)
    fleet = GridFleet(divided(toys, tmp_path), HELLO, patience, said.append, unsuited=asked)
    assert [client.id for client in fleet.available(1)] == ["c0", "c2", "c3"]
    [refused] = [event for event in said if event["event"] == "refused"]
    assert refused["site"] == "site-1"
    assert "ranks must be equal, but client 'c1' has rank 2" in refused["reason"]


def test_a_site_that_fails_while_it_loads_is_named_to_whoever_watches(toys: Fleet, tmp_path: Path) -> None:
    def broken(message: Message) -> Message:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the site's worker failed"), reply_to=message)

    said: list[Mapping[str, Any]] = []
    grid = divided(toys, tmp_path)
    grid.nodes[101] = broken
    names = {100 + number: f"site-{number}" for number in range(3)}
    fleet = GridFleet(grid, HELLO, replace(QUICK, sites=2), said.append, nodes=names)
    assert [client.id for client in fleet.available(1)] == ["c0", "c2", "c3"]
    [refused] = [event for event in said if event["event"] == "refused"]
    assert refused["site"] == "site-1"
    assert "the site's worker failed" in refused["reason"]


def test_who_cannot_be_served_costs_the_others_neither_rounds_nor_scores(
    toys: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranked(toys, "c1", 2)
    fleet = GridFleet(divided(toys, tmp_path), HELLO, QUICK)
    reports = list(rounds(toys.algorithm, toys.spec, fleet, total=1, seed=0))
    assert (reports[1].folded, reports[1].lost) == (("c0", "c2", "c3", "c4"), ("c1",))
    found = dict(evaluate(toys.algorithm, reports[1].checkpoint, fleet, toys.clients.values(), total=1))
    assert sorted(found) == ["c0", "c2", "c3", "c4"]
    assert "client 'c1' is left out: averaging factors: ranks must be equal" in caplog.text


@pytest.mark.parametrize("again", ["fedlora resume runs/it", "the same fedlora server start"])
def test_too_few_sites_say_how_to_go_on(toys: Fleet, tmp_path: Path, again: str) -> None:
    fleet = GridFleet(divided(toys, tmp_path), HELLO, replace(QUICK, sites=4, join=0.1), again=again)
    with pytest.raises(UserError, match=f"3 of 4 sites[\\s\\S]*then go on with: {again}"):
        fleet.available(1)


def test_a_site_that_was_away_introduces_itself_again(toys: Fleet, tmp_path: Path) -> None:
    """It comes back under its old number, and may have other examples than before."""
    fleet = GridFleet(divided(toys, tmp_path), HELLO, QUICK)
    fleet.available(1)
    grid: Any = fleet.grid
    before = toys.clients["c0"].examples or 0
    grid.here = {101, 102}
    assert [client.id for client in fleet.available(2)] == ["c1", "c2", "c4"]
    toys.inner.clients = {**toys.clients, "c0": replace(toys.clients["c0"], examples=before + 40)}
    grid.nodes, grid.here = divided(toys, tmp_path).nodes, {100, 101, 102}
    fleet.available(3)
    assert [client.id for client in fleet.available(3)] == sorted(toys.clients)
    assert fleet.clients["c0"].examples == before + 40


def test_a_site_that_leaves_before_it_is_asked_introduces_itself_again(toys: Fleet, tmp_path: Path) -> None:
    fleet = GridFleet(divided(toys, tmp_path), HELLO, QUICK)
    checkpoint = list(rounds(toys.algorithm, toys.spec, fleet, total=1, seed=0))[-1].checkpoint
    grid: Any = fleet.grid
    grid.here = {101, 102}
    everybody = list(toys.clients.values())
    found = dict(evaluate(toys.algorithm, checkpoint, fleet, everybody, total=1))
    assert sorted(found) == ["c1", "c2", "c4"]
    assert fleet.sites["site-0"].silent
