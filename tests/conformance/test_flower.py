"""The conformance table on the Flower engine: every property that an engine could break, over an in-process Grid."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from conformance import table, test_conformance
from conformance.grid import Flower
from conformance.toy import Fleet
from fedlora.algorithms import ALGORITHMS
from fedlora.federation.wire import same

every = pytest.mark.parametrize("name", sorted(ALGORITHMS))
PROPERTIES: dict[str, dict[str, Any]] = {
    "test_crash_two_rounds_past_a_checkpoint_and_resume": {"share": 0.6},
    "test_lost_after_training_is_never_asked": {"when": 2},
    "test_introductions_are_checkpointed": {},
    "test_empty_round_changes_nothing": {},
    "test_late_joiner_skipped_rounds_and_strangers": {},
    "test_evaluation_writes_nothing": {},
    "test_order_of_replies": {},
    "test_inputs_are_not_modified": {},
    "test_float32_stays_float32": {},
}


def remote(folder: Path) -> Any:
    """``world`` with its clients at sites."""

    def world(name: str, **options: Any) -> Flower:
        fleet = table.world(name, **options)
        return Flower(**{field.name: getattr(fleet, field.name) for field in dataclasses.fields(Fleet)}, folder=folder)

    return world


@every
@pytest.mark.parametrize("prop", sorted(PROPERTIES))
def test_property(name: str, prop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_conformance, "world", remote(tmp_path / "sites"))
    options = dict(PROPERTIES[prop])
    if "resume" in prop:
        options["tmp_path"] = tmp_path
    getattr(test_conformance, prop)(name, **options)


@every
def test_equals_the_simulator(name: str, tmp_path: Path) -> None:
    """State, memories and scores, bit for bit, whoever carries the messages."""
    here, there = table.world(name), remote(tmp_path)(name)
    a, b = (test_conformance.run(fleet)[-1] for fleet in (here, there))
    assert same(a.checkpoint, b.checkpoint)
    assert same(test_conformance.memories(here, a), test_conformance.memories(there, b))
    assert test_conformance.score(here, a, "loss") == test_conformance.score(there, b, "loss")
    assert a.bytes == b.bytes
