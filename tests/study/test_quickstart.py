"""What the quickstart writes before it trains: real files of installed packages, divided by file."""

from __future__ import annotations

import json
from pathlib import Path

from fedlora.data.packages import sources
from fedlora.study.config import load
from fedlora.study.quickstart import HELD_BYTES, PLANS, TRAIN_BYTES, divided, text_of, write_data


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


def test_the_run_files_it_writes_are_valid_and_see_its_data(tmp_path: Path) -> None:
    names = write_data(tmp_path / "data", seed=0)
    assert len(names) >= 10
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert {row["client"] for row in rows} == set(names)
    for plan in PLANS:
        file = tmp_path / f"{plan.file}.toml"
        file.write_text(text_of(plan, 5, file, "float32"))
        config = load(file)
        assert config.seed == 5
        assert config.algorithm.name == plan.algorithm
        assert config.data.train == str(tmp_path / "data" / "train.jsonl")
