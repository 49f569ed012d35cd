"""A round of 1,000 clients holds hardly more than one of 20."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.memory import FEW, LIMIT, MANY, measure


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedit", "flexlora"])
def test_a_thousand_clients_need_no_more_memory(tmp_path: Path, algorithm: str) -> None:
    for name in ("few", "many"):
        (tmp_path / name).mkdir()
    few = measure(tmp_path / "few", "tiny", algorithm, FEW)
    many = measure(tmp_path / "many", "tiny", algorithm, MANY)
    assert many["client_steps"] > 10 * few["client_steps"]
    assert many["megabytes"] - few["megabytes"] < LIMIT
