"""What was given and is not used: a user hears of it."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from fedlora.data.population import build
from fedlora.data.settings import DataSettings, PartitionSettings

TASK = "text-classification"


def _lines(count: int, **more: list[str]) -> str:
    """Examples without near-copies, as JSON lines; ``more``: further columns, their values in turn."""
    word = lambda i: "".join(chr(97 + int(digit)) for digit in str(7919 * (i + 1) ** 3))  # noqa: E731
    rows = [{"text": f"{word(i)} {word(i + 1000)}", "label": "ab"[i % 2]} for i in range(count)]
    rows = [row | {name: values[i % len(values)] for name, values in more.items()} for i, row in enumerate(rows)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _warnings(**data: object) -> tuple[str, ...]:
    given = {"partition": PartitionSettings(clients=2), **data}
    return build(DataSettings(**given), TASK).warnings  # type: ignore[arg-type]


def test_a_split_column_that_nobody_heeds(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(_lines(60, split=["train", "train", "Test"]))
    (warning,) = _warnings(train=str(file))
    assert warning == (
        f"{file}: every row is taken as train, whatever its column 'split' says; to heed it: "
        f'test = "{file}:Test", train = "{file}:train"'
    )
    assert _warnings(train=f"{file}:train", test=f"{file}:Test") == ()
    assert _warnings(train=str(file), partition=PartitionSettings(column="split")) == ()
    file.write_text(_lines(60, split=["left", "right"]))
    assert _warnings(train=str(file)) == ()


@pytest.mark.parametrize("name", ["test.jsonl", "test/a.jsonl"])
def test_the_test_data_of_a_folder_that_nobody_reads(tmp_path: Path, name: str) -> None:
    for file, content in (("train.jsonl", _lines(40)), ("README.md", "notes"), ("old.xlsx", "x"), (name, _lines(4))):
        path = tmp_path / "d" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    folder, first = tmp_path / "d", name.split("/")[0]
    assert _warnings(train=str(folder)) == (
        f"folder {folder}: not read: 'old.xlsx', {first!r}; to read it: test = \"{folder}\"",
    )
    (folder / "old.xlsx").unlink()
    assert not any("not read" in warning for warning in _warnings(train=str(folder), test=str(folder)))


def test_labels_of_few_templates_that_no_test_row_has(tmp_path: Path) -> None:
    """Near-copies stay on one side, so a label whose rows are made of two templates may be all training."""
    templates = {"fx": ("rate of the euro", "price of a dollar"), "card": ("my card is lost", "please block it now")}
    rows = [
        {"text": f"{text} {i}", "label": name} for name, two in templates.items() for text in two for i in range(20)
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + _lines(80))
    (warning,) = _warnings(train=str(file), partition=PartitionSettings(clients=4))
    assert warning == (
        "no test example has 'card', 'fx', of 30 and more: near-copies stay together (data.test may name others)"
    )
    others = tmp_path / "test.jsonl"  # what a user's own test file has is his choice
    others.write_text(_lines(10))
    assert not any(line.startswith("no test example") for line in _warnings(train=str(file), test=str(others)))


def test_the_other_datasets_of_a_saved_folder(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([json.loads(line) for line in _lines(40).splitlines()])
    parts = {"train": rows, "test": rows.select(range(4))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    assert _warnings(train=str(tmp_path / "d")) == (
        f"folder {tmp_path / 'd'}: not read: 'test'; to read it: test = \"{tmp_path / 'd'}\"",
    )
    assert not any("not read" in warning for warning in _warnings(train=f"{tmp_path}/d", test=f"{tmp_path}/d"))


def test_a_quantity_as_label(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [json.loads(line) for line in _lines(80).splitlines()]
    for texts in ("ab", [str(i) for i in range(40)]):
        said = [row | {"label": texts[i % len(texts)]} for i, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in said))
        assert not any("labels are numbers" in warning for warning in _warnings(train=str(file)))
    file.write_text("".join(json.dumps(row | {"label": i / 7}) + "\n" for i, row in enumerate(rows)))
    assert any(warning.startswith("80 labels are numbers ('0', ") for warning in _warnings(train=str(file)))
