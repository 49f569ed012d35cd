"""What a run folder says of its federation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from fedlora.engines.flower.host import PLAN, Plan
from fedlora.study.experiment import Terms


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    terms = Terms(("a", "b"), ("text", "label"), {"site": 4}, 2, {"north": {"site": 2}}, {"north": "base"})
    plan = Plan("id", terms, "digest", 3, ("examples are near-copies",))
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    written = json.loads((tmp_path / PLAN).read_text())
    del written["warnings"]  # as folders of before have it
    (tmp_path / PLAN).write_text(json.dumps(written))
    assert Plan.load(tmp_path) == Plan("id", terms, "digest", 3)
