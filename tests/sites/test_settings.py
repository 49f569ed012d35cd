"""site.toml: what is wrong is named with its value and the nearest right name; the template is itself valid."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import UserError
from fedlora.sites.settings import FILE, SiteSettings, load, parse, size, template
from fedlora.study.config import read

GOOD: dict[str, Any] = {
    "name": "north",
    "server": {"address": "fed.example.org:9092"},
    "data": {"train": "mine.csv", "text": "Befund", "label": "Klasse", "labels": {"gut": "benign"}},
}


def changed(section: str, **keys: Any) -> dict[str, Any]:
    return {**GOOD, section: {**GOOD.get(section, {}), **keys}}


def test_defaults() -> None:
    site = parse(GOOD)
    assert site.allow.algorithms == "built-in"
    assert site.allow.bytes == 200_000_000
    assert not site.server.insecure
    assert "backbone" not in site.allow.upload
    columns = site.data.columns()
    assert (columns.text, columns.label, columns.train) == ("Befund", "Klasse", "mine.csv")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (changed("resources", rnak=3), ["resources.rnak", "did you mean 'rank'?"]),
        (changed("resources", rank=3, memory="2 GB"), ["rank or memory, not both"]),
        (changed("resources", memory="2 bananas"), ["2 bananas", "200 MB"]),
        (changed("resources", rank=0), ["resources.rank", "0"]),
        (changed("server", address="nowhere"), ["server.address", "'nowhere'", "host:port"]),
        (changed("server", address="host:70000"), ["host:port"]),
        (changed("allow", algorithms=["fedti"]), ["fedti", "did you mean 'fedit'?"]),
        (changed("allow", upload=["rows"]), ["allow.upload", "rows"]),
        (changed("allow", steps=0), ["allow.steps"]),
        ({**GOOD, "name": "../etc"}, ["name", "../etc"]),
        ({key: value for key, value in GOOD.items() if key != "data"}, ["'data' is missing"]),
    ],
)
def test_what_is_wrong_is_named(value: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(value)
    for word in ["site.toml", *words]:
        assert word in str(error.value)


def test_paths_start_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("a,b\n")
    (tmp_path / FILE).write_text(
        'name = "n"\n[server]\naddress = "h:1"\n[data]\ntrain = ["mine.csv", "mine.csv:train", "owner/hub"]\n'
    )
    for place in (tmp_path, tmp_path / FILE):
        site = load(place)
        here = str(tmp_path / "mine.csv")
        assert site.data.train == (here, f"{here}:train", "owner/hub")
        assert site.server.ca == str(tmp_path / "ca.pem")
        assert site.server.key == str(tmp_path / "site.key")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('\ufeffname = "n"\n[server]\naddress = "h:1"\n[data]\ntrain = "a.csv"\n', "utf-8")
    assert load(tmp_path).name == "n"
    (tmp_path / "my.toml").write_text("\ufeff[data]\nseed = 3\n", "utf-8")
    assert read(tmp_path / "my.toml") == {"data": {"seed": 3}}


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fedlora site init"):
        load(tmp_path)
    (tmp_path / FILE).write_text("name = north")
    with pytest.raises(UserError, match="not valid TOML"):
        load(tmp_path)


@given(
    st.text(max_size=20), st.text(max_size=20), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
)
def test_the_template_holds_whatever_it_was_given(train: str, column: str, labels: dict[str, str]) -> None:
    text = template("north", "h:9092", train, {"text": column, "label": "y"}, labels=labels, rank=3)
    site = SiteSettings.model_validate(tomllib.loads(text))
    assert (site.data.labels, site.resources.rank) == (labels, 3)
    assert (site.name, site.data.train, site.data.text, site.data.label) == ("north", train, column, "y")


@given(st.integers(1, 10**15), st.sampled_from(["", "B", "kB", "MB", "GiB", "TB"]))
def test_sizes(number: int, unit: str) -> None:
    factor = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GiB": 2**30, "TB": 10**12}[unit]
    assert size(f"{number} {unit}") == pytest.approx(number * factor, rel=1e-12)
