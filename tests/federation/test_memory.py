"""Client memory: versions, percent-encoded names, and a kill at any moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import UserError
from fedlora.federation.memory import DiskMemory, RamMemory, Store, quoted
from fedlora.federation.wire import same

MEMORY = {"own": {"x/A": torch.ones(2, 3)}, "rounds": 3}


@pytest.fixture(params=["ram", "disk"])
def store(request: Any, tmp_path: Path) -> Store:
    return RamMemory("a/b") if request.param == "ram" else DiskMemory(tmp_path, "a/b")


def test_keeps_exactly_what_can_be_asked_for(store: Store) -> None:
    for version in range(4):
        store.write("run", version, {**MEMORY, "rounds": version}, keep={version - 1, 0, None})
    store.write("other", 9, {}, keep=())
    assert [store.read("run", v)["rounds"] for v in (0, 2, 3)] == [0, 2, 3]
    with pytest.raises(UserError, match=r"'a/b' has no memory of round 1 of run 'run', only of rounds \[0, 2, 3\]"):
        store.read("run", 1)
    store.write("run", -1, {}, keep=())  # an introduction before round 0 of another try
    assert store.read("run", -1) == {}
    assert store.read("other", 9) == {}


def test_nothing_is_shared(store: Store) -> None:
    mine = {"x": torch.ones(3)}
    store.write("run", 1, mine, keep=())
    mine["x"].zero_()
    store.read("run", 1)["x"].zero_()
    assert float(store.read("run", 1)["x"].sum()) == 3


def test_a_kill_between_temporary_file_and_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskMemory(tmp_path, "c")
    store.write("run", 1, MEMORY, keep=())

    def killed(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write("run", 2, {"rounds": 4}, keep={1})
    again = DiskMemory(tmp_path, "c")  # a new process
    assert again.versions("run") == [1]
    assert same(again.read("run", 1), MEMORY)
    again.write("run", 2, {"rounds": 4}, keep={1})
    assert sorted(path.name for path in again.path("run", 2).parent.iterdir()) == ["1.safetensors", "2.safetensors"]


def test_a_kill_before_old_versions_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskMemory(tmp_path, "c")
    store.write("run", 1, {}, keep=())

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write("run", 2, MEMORY, keep=())
    again = DiskMemory(tmp_path, "c")
    assert again.versions("run") == [1, 2]
    assert same(again.read("run", 2), MEMORY)


def test_flush_syncs_what_is_new_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(handle))
    store = DiskMemory(tmp_path, "c")
    store.write("run", 1, {}, keep=())
    store.write("run", 2, {}, keep=())  # version 1 is gone: nothing to sync
    assert not synced
    store.flush()
    assert len(synced) == 2  # the file and its folder
    store.flush()
    assert len(synced) == 2


def test_a_damaged_memory_names_its_file(tmp_path: Path) -> None:
    store = DiskMemory(tmp_path, "c")
    store.write("run", 1, MEMORY, keep=())
    store.path("run", 1).write_bytes(b"junk")
    with pytest.raises(UserError, match=r"1\.safetensors: the memory of client 'c' is damaged"):
        store.read("run", 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=300), min_size=2, max_size=6, unique=True))
def test_names_of_any_characters_are_different_safe_file_names(names: list[str]) -> None:
    paths = [quoted(name) for name in names]
    assert len(set(paths)) == len(names)
    for path in paths:
        assert 0 < len(path.encode()) <= 200
        assert not set(path) & set('/\\:*?"<>|')
        assert not path.startswith(".")


def test_long_names_that_begin_alike(tmp_path: Path) -> None:
    one, two = (DiskMemory(tmp_path, "é" * 300 + end) for end in "ab")
    one.write("r" * 400, 1, {"who": "one"}, keep=())
    two.write("r" * 400, 1, {"who": "two"}, keep=())
    assert one.read("r" * 400, 1) == {"who": "one"}
