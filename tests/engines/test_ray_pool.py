"""Actors that end: real processes, real kills, nothing learnt. (Whole runs: test_ray.py.)"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install fedlora[ray]")

from fedlora.engines.ray.pool import Pool  # noqa: E402
from fedlora.errors import UserError  # noqa: E402

Pools = Callable[..., Pool]


def actor(folder: Path) -> Any:
    """A class of actors; defined here, so that Ray sends it whole instead of importing it from the tests."""

    class Toy:
        def load(self) -> str:
            if (folder / "nobody loads").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return f"pid {os.getpid()}"

        def work(self, item: str) -> tuple[str, bytes]:
            """Answers; "slow" ones take a while, "fatal" ones end the actor, once or always, "wrong" ones raise."""
            (folder / f"{item} began on {os.getpid()}").touch()
            if item.startswith("slow"):
                time.sleep(0.5)
            if item == "always fatal" or (item == "fatal" and not (folder / "fatal happened").exists()):
                (folder / "fatal happened").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if item == "wrong":
                raise UserError("the program is wrong", "correct it")
            return item.upper(), item.encode() * 100_000

    return Toy


@pytest.fixture
def pools(connection: None, tmp_path: Path) -> Iterator[Pools]:
    made: list[Pool] = []

    def make(actors: int = 2, patience: float = 60.0, cores: float = 1) -> Pool:
        remote = ray.remote(num_cpus=cores)(actor(tmp_path))
        made.append(Pool(remote.remote, lambda one: one.load.remote(), actors, patience))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def call(one: Any, item: str) -> Any:
    return one.work.options(num_returns=2).remote(item)


def test_a_killed_actors_item_is_done_by_another(pools: Pools, tmp_path: Path) -> None:
    """In the items' order, whoever did them; a kill from within and one from outside."""
    pool = pools()
    pool.open()
    items = ["slow first", "b", "fatal", *"cdefgh", "slow last"]

    def kill() -> None:
        end = time.monotonic() + 60
        while not (began := list(tmp_path.glob("slow last began on *"))) and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(int(began[0].name.split()[-1]), signal.SIGKILL)

    outside = threading.Thread(target=kill)
    outside.start()
    found = [(small, large[:1].decode()) for small, large in pool.each(call, items)]
    outside.join()
    assert found == [(item.upper(), item[0]) for item in items]
    for twice in ("fatal", "slow last"):
        assert len(list(tmp_path.glob(f"{twice} began on *"))) == 2
    assert len(list(tmp_path.glob("slow first began on *"))) == 1
    assert pool.count == 4
    assert len(pool.members) == 2
    again = [small for small, _ in pool.each(call, ["x", "y", "z"])]
    assert again == ["X", "Y", "Z"]


def test_actors_that_ended_while_they_had_nothing_to_do_are_not_the_items_fault(pools: Pools) -> None:
    """As many as may end over an item, all at once, as with a node: the item goes to those that take their place."""
    pool = pools(3, cores=0.5)
    pool.open()
    while pool.loading:
        list(pool.each(call, ["a"]))
    for member in pool.idle:
        os.kill(int(member.where.split()[-1]), signal.SIGKILL)
    assert [small for small, _ in pool.each(call, ["b"])] == ["B"]
    assert len(pool.members) == 3
    assert not {1, 2, 3} & {member.number for member in pool.idle}


@pytest.mark.slow
def test_what_always_ends_its_actor_is_named(pools: Pools) -> None:
    pool = pools()
    pool.open()
    with pytest.raises(UserError, match=r"always fatal: 3 actors have ended over it(.|\n)*fedlora resume"):
        list(pool.each(call, ["a", "always fatal", "b"]))


def test_what_a_program_raises_is_raised_here(pools: Pools) -> None:
    pool = pools(1)
    pool.open()
    with pytest.raises(UserError, match=r"^the program is wrong\n  -> correct it$"):
        list(pool.each(call, ["a", "wrong", "b"]))


@pytest.mark.slow
def test_actors_that_cannot_load_and_those_that_nobody_can_start(pools: Pools, tmp_path: Path) -> None:
    (tmp_path / "nobody loads").touch()
    with pytest.raises(UserError, match="3 actors have ended while they loaded"):
        pools(1).open()
    (tmp_path / "nobody loads").unlink()
    both = pools(2)
    both.open()
    assert [small for small, _ in both.each(call, ["slow a", "slow b"])] == ["SLOW A", "SLOW B"]
    with pytest.raises(UserError, match=r"no actor was ready after 1 s \(wanted: 1\)(.|\n)*ray status"):
        pools(1, patience=1.0).open()  # both cores are taken
