"""The demonstration on docstrings: what its data is, and that the adapter matters on it."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.demos import docstrings
from fedlora.demos.demo import show
from fedlora.demos.docstrings import DOCSTRINGS, SIZES, VERBS

SMALL = {"test": 8, "validation": 4, "train": 16}
Rows = list[Mapping[str, str]]


def small(patch: pytest.MonkeyPatch) -> None:
    """Three packages of the standard library, a few examples of each."""
    patch.setattr(docstrings, "PACKAGES", ("email", "asyncio", "unittest"))
    patch.setattr(docstrings, "SIZES", SMALL)


def written(folder: Path) -> dict[str, Rows]:
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()] for split in SIZES
    }


def test_examples_are_split_by_file_and_none_is_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    names = docstrings.write_data(tmp_path / "one", seed=3)
    assert names == ["email", "asyncio", "unittest"]
    parts = written(tmp_path / "one")
    files = {split: {(row["client"], row["file"]) for row in rows} for split, rows in parts.items()}
    assert not files["train"] & files["test"]
    assert not files["train"] & files["validation"]
    assert not files["validation"] & files["test"]
    every = [row for rows in parts.values() for row in rows]
    words = [re.sub(r"[\W\d_]+", " ", row["text"].lower()) for row in every]
    assert len(set(words)) == len(words)
    assert {row["label"] for row in every} <= set(VERBS.values())
    assert {row["label"] for row in every} == {row["label"] for row in parts["train"]}
    for split, rows in parts.items():
        counts = Counter(row["client"] for row in rows)
        assert 0 < max(counts.values()) <= SMALL[split]
        assert len(counts) == 3
    docstrings.write_data(tmp_path / "again", seed=3)
    docstrings.write_data(tmp_path / "other", seed=4)
    assert written(tmp_path / "again") == parts != written(tmp_path / "other")


def test_a_part_is_filled_before_the_next_and_a_file_is_never_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "SIZES", {"test": 3, "validation": 1, "train": 4})
    rows = [
        {"file": name, "text": f"{name}{i}"} for name, count in zip("abcdef", (2, 2, 3, 1, 5, 9)) for i in range(count)
    ]
    parts = docstrings.split_by_file(rows)
    found = {split: [row["text"] for row in own] for split, own in parts.items()}
    assert found == {"test": ["a0", "a1", "b0"], "validation": ["c0"], "train": ["d0", "e0", "e1", "e2"]}


@pytest.mark.slow
def test_its_table_is_of_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    short = [replace(plan, rounds=1) for plan in DOCSTRINGS.plans]
    console = Console(file=io.StringIO(), width=120)
    show(replace(DOCSTRINGS, plans=short), tmp_path / "out", seed=1, console=console)
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "table.json").read_text())["rows"]}
    assert list(rows) == ["class prior", *(name for name, _, _ in DOCSTRINGS.rows), "all data pooled (not federated)"]
    parts = written(tmp_path / "out" / "data")
    scores = []
    for client in ("email", "asyncio", "unittest"):
        known = Counter(
            row["label"] for split in ("train", "validation") for row in parts[split] if row["client"] == client
        )
        test = [row["label"] for row in parts["test"] if row["client"] == client]
        ties = {label for label, count in known.items() if count == max(known.values())}
        scores.append({sum(label == guess for label in test) / len(test) for guess in ties})
    low, high = (sum(end(values) for values in scores) / 3 for end in (min, max))
    assert low - 1e-9 <= rows["class prior"]["mean"] <= high + 1e-9
    assert all(0 <= row[key] <= 1 for row in rows.values() for key in ("mean", "worst_decile"))
    sent = {name: row["sent"] for name, row in rows.items()}
    for name in ("class prior", "each alone", "pooled, frozen encoder", "all data pooled (not federated)"):
        assert sent[name] == 0
    assert sent["frozen encoder, a head each"] < sent["CE-LoRA"] < sent["FedIT"] < sent["FlexLoRA"]
    assert "accuracy on held-out docstrings" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "@font-face" not in (tmp_path / "out" / "table.svg").read_text()


@pytest.mark.slow
def test_the_adapter_matters(tmp_path: Path) -> None:
    """By five points over three seeds: one seed's 400 test rows tell two of them apart, not more."""
    plans = [plan for plan in DOCSTRINGS.plans if plan.algorithm == "pooled"]
    lines = [line for line in DOCSTRINGS.rows if line[1] == "pooled-head"]
    shown, means = replace(DOCSTRINGS, plans=plans, rows=lines), []
    for seed in range(3):
        show(shown, tmp_path / str(seed), seed=seed, console=Console(file=io.StringIO()))
        rows = json.loads((tmp_path / str(seed) / "table.json").read_text())["rows"]
        means.append([row["mean"] for row in rows])
    prior, frozen, adapted = (sum(column) / 3 for column in zip(*means, strict=True))
    assert adapted >= frozen + 0.05
    assert frozen > prior
