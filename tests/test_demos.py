"""What the quickstart writes before it trains: real files of installed packages, divided by file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.data.packages import sources
from fedlora.demos import DEMOS, docstrings
from fedlora.demos.code_bases import HELD_BYTES, TRAIN_BYTES, divided
from fedlora.study.algorithm import build
from fedlora.study.config import load


def test_no_file_is_in_two_parts_and_every_text_is_real() -> None:
    files = sources("email")
    parts = divided(files, "email", seed=3)
    assert set(parts) == {"train", "validation", "test"}
    names = [path for part in parts.values() for path, _ in part]
    assert len(names) == len(set(names))
    texts = dict(files)
    assert all(texts[path].startswith(text) and text for part in parts.values() for path, text in part)
    sizes = {split: sum(len(text) for _, text in part) for split, part in parts.items()}
    assert sizes["test"] == sizes["validation"] == HELD_BYTES
    assert sizes["train"] <= TRAIN_BYTES
    assert divided(files, "email", seed=3) == parts != divided(files, "email", seed=4)


@pytest.mark.parametrize("task", DEMOS)
def test_the_run_files_it_writes_are_valid_and_see_its_data(tmp_path: Path, task: str) -> None:
    demo = DEMOS[task]
    names = demo.prepare(tmp_path / "data", 0)
    assert len(names) >= 10
    for plan in demo.plans:
        file = tmp_path / f"{plan.file}.toml"
        file.write_text(demo.text_of(plan, 5, file, "float32"))
        config = load(file)
        assert config.seed == 5
        assert config.algorithm.name == plan.algorithm
        build(config)
        rows = [json.loads(line) for line in Path(str(config.data.train)).read_text().splitlines()]
        assert {row["client"] for row in rows} == set(names)
    assert {run for _, run, _ in demo.rows} <= {plan.file for plan in demo.plans}


def test_the_verb_is_the_label_and_not_in_the_text() -> None:
    source = """
def edges(graph):
    \"\"\"Return the number of edges
    in a graph.

    Returns what it returns.
    \"\"\"

class Box:
    \"\"\"Creates a box.\"\"\"
    def fill(self):
        "Fills the box with whatever there is."
    async def check(self):
        "Verifies that there is nothing left in it."
"""
    found = list(docstrings.summaries(source))
    assert found == [
        "Return the number of edges in a graph.",
        "Fills the box with whatever there is.",
        "Verifies that there is nothing left in it.",
    ]
    assert [docstrings.divided(text) for text in found] == [
        ("the number of edges in a graph.", "return"),
        None,
        ("that there is nothing left in it.", "check"),
    ]
