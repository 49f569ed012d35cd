"""A site's own columns and label names become the run's; what does not fit is named with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import UserError
from fedlora.learning.loading import load_backbone
from fedlora.sites.data import population, rank_of
from fedlora.sites.settings import SiteSettings, parse
from fedlora.study.config import RunConfig
from fedlora.study.config import parse as parse_run
from study.tiny import encoder

LABELS = ("malign", "benign", "unclear")


def run_file(**sections: Any) -> RunConfig:
    value = {
        "model": {"name": "minilm", "task": "text-classification"},
        "data": {"labels": list(LABELS)},
        "algorithm": {"name": "flexlora"},
        **sections,
    }
    return parse_run(value, "run.toml")


def site(folder: Path, lines: list[str], *, test: list[str] | None = None, **sections: Any) -> SiteSettings:
    (folder / "mine.csv").write_text("\n".join(["Befund,Klasse,alter", *lines]) + "\n")
    data: dict[str, Any] = {"train": str(folder / "mine.csv"), "text": "Befund", "label": "Klasse", "least": 5}
    if test is not None:
        (folder / "test.csv").write_text("\n".join(["Befund,Klasse,alter", *test]) + "\n")
        data["test"] = str(folder / "test.csv")
    data["labels"] = {"gut": "benign", "böse": "malign"}
    extra = sections.pop("data", {})
    value = {"name": "north", "server": {"address": "h:1"}, "data": {**data, **extra}, **sections}
    return parse(value)


def rows(count: int = 40) -> list[str]:
    return [f"text number {i} of many,{'gut' if i % 3 else 'böse'},{i}" for i in range(count)]


def test_names_are_mapped_and_the_run_s_order_of_labels_kept(tmp_path: Path) -> None:
    found = population(site(tmp_path, rows()), run_file(), LABELS)
    assert found.labels == LABELS
    assert list(found.clients) == ["north"]
    assert set(found.fields) == {"text", "label"}
    assert sorted(found.table["label"][:]).count("malign") == 14
    own = found.clients["north"]
    assert sum(len(part) for part in own.values()) == 40
    assert len(own["test"]) > 0


def test_a_test_file_may_hold_a_label_that_only_other_sites_train(tmp_path: Path) -> None:
    found = population(site(tmp_path, rows(), test=["another one,unclear,3", "and one,gut,2"]), run_file(), LABELS)
    kept = found.table[:]["label"]
    assert [kept[row] for row in sorted(found.clients["north"]["test"])] == ["unclear", "benign"]


def test_an_unknown_label_is_named_with_its_line(tmp_path: Path) -> None:
    lines = rows()
    lines[7] = "strange,bengin,1"
    with pytest.raises(UserError) as error:
        population(site(tmp_path, lines), run_file(), LABELS)
    for word in ("mine.csv, line 9", "'bengin'", "nearest: 'benign'", "[data.labels]"):
        assert word in str(error.value)


def test_mappings_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no label 'bening' \(nearest: 'benign'\)"):
        population(site(tmp_path, rows(), data={"labels": {"gut": "bening"}}), run_file(), LABELS)
    more = {"gut": "benign", "böse": "malign", "guut": "benign"}
    with pytest.raises(UserError, match=r"'guut', which no row has"):
        population(site(tmp_path, rows(), data={"labels": more}), run_file(), LABELS)


def test_a_wrong_column_and_too_little_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'Klase'.*nearest: 'Klasse'"):
        population(site(tmp_path, rows(), data={"label": "Klase"}), run_file(), LABELS)
    with pytest.raises(UserError, match=r"'north' has \d+ training examples, fewer than \[data\] least = 500"):
        population(site(tmp_path, rows(), data={"least": 500}), run_file(), LABELS)


def test_language_models_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_text("".join(f'{{"frage": "was {i}", "antwort": "das {i}"}}\n' for i in range(30)))
    value: dict[str, Any] = {"name": "s", "server": {"address": "h:1"}}
    value["data"] = {"train": str(tmp_path / "qa.jsonl"), "prompt": "frage", "response": "antwort"}
    config = run_file(model={"name": "embedded-lm", "task": "causal-lm"}, data={})
    found = population(parse(value), config, ())
    assert set(found.fields) == {"prompt", "response"}
    assert found.labels == ()


def test_the_rank_follows_from_the_memory(tmp_path: Path) -> None:
    backbone = load_backbone(encoder(tmp_path / "enc"), "text-classification", labels=LABELS)
    config = run_file(adapter={"rank": 16}, engine={"tokens": 64})
    lines = rows()

    def rank(**resources: Any) -> int:
        return rank_of(site(tmp_path, lines, resources=resources), config, backbone)

    assert rank() == 16
    assert rank(rank=3) == 3
    assert rank(rank=99) == 16
    assert rank(memory="1 GB") == 16
    with pytest.raises(UserError, match="memory = 1,000 bytes") as error:
        rank(memory=1000)
    least = int(str(error.value).split("need about ")[1].split("\n")[0].replace(",", ""))
    assert least > (tmp_path / "enc" / "model.safetensors").stat().st_size
    assert rank(memory=least) == 1
    factors = 2 * 2 * (32 + 32)  # a row of A and a column of B at query and value of two layers
    found = [rank(memory=least + k * (16 * factors + 4 * 64 * 4)) for k in range(20)]
    assert found == [min(k + 1, 16) for k in range(20)]
    with pytest.raises(UserError):
        rank(memory=least - 1)
