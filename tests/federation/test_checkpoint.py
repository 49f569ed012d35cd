"""Checkpoints are whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fedlora.errors import UserError
from fedlora.federation.checkpoint import latest, save
from fedlora.federation.wire import same


def state(round: int) -> dict[str, object]:
    return {"round": round, "state": {"x": torch.full((3,), float(round))}, "acked": {"c/1": round}}


def test_keeps_the_last_two(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    for round in range(12):
        save(tmp_path, state(round), {"lines": round + 1})
    assert same(latest(tmp_path), {**state(11), "lines": 12})
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]


def test_a_round_saved_again_replaces_itself(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    save(tmp_path, {**state(1), "acked": {}})
    assert latest(tmp_path)["acked"] == {}  # type: ignore[index]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Steps of a save that change names: data file, manifest; each is cut before or after its rename."""
    save(tmp_path, state(1))
    save(tmp_path, state(2))
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if moment % 2 and len(calls) == moment // 2 + 1:
            real(source, target)
        if len(calls) == moment // 2 + 1:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, state(3))
    assert same(latest(tmp_path), state(3 if moment == 3 else 2))
    save(tmp_path, state(3))
    assert same(latest(tmp_path), state(3))
    assert len(list(tmp_path.iterdir())) == 4  # leftovers are gone


def test_damage_falls_back_and_is_named_when_nothing_is_left(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    manifest = save(tmp_path, state(2))
    data = tmp_path / json.loads(manifest.read_text())["file"]
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)  # one bit
    assert same(latest(tmp_path), state(1))
    manifest.write_text("{")
    assert same(latest(tmp_path), state(1))
    save(tmp_path, state(3))  # tidying up does not stumble over it
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        latest(tmp_path)
