"""When pages are given back: where more are held than the work has been seen to need."""

from __future__ import annotations

from mmap import PAGESIZE, mmap

import pytest

from fedlora.learning import footprint
from fedlora.learning.footprint import Pages, resident


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the C library."""
    called: list[str] = []
    monkeypatch.setattr(footprint, "_libc", lambda name: lambda *_: called.append(name))
    return called


def test_steady_work_gives_nothing_back(trims: list[str]) -> None:
    pages = Pages()
    for held in (100, 104, 109, 100, 108):
        pages.look(held)
    assert trims == []


def test_what_gathers_is_given_back_every_time(trims: list[str]) -> None:
    pages = Pages()
    for held in (100, 111, 100, 112, 101, 113):  # each release is followed by what the work needs
        pages.look(held)
    assert trims == ["malloc_trim"] * 3


def test_work_that_needs_more_is_learnt(trims: list[str]) -> None:
    pages = Pages()
    for held in (100, 200, 200, 210, 190):  # after a release the work holds as much again
        pages.look(held)
    assert trims == ["malloc_trim"]
    assert pages.needed == 200


@pytest.mark.skipif(not resident(), reason="this system does not say")
def test_resident_bytes_grow_with_what_is_touched() -> None:
    size = 1 << 26
    with mmap(-1, size) as held:  # not from the allocator, which may hold that much from the tests before
        before = resident()
        for page in range(0, size, PAGESIZE):
            held[page] = 1
        assert resident() - before > 0.9 * size
