"""`site check` says what is wrong, where and what to do, and shows nothing of the data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.errors import UserError
from fedlora.sites import keys
from fedlora.sites.check import Line, check
from fedlora.study.config import RunConfig, load
from sites.test_keys import listening
from study.tiny import FILLERS, TOPICS, encoder, language_model

WORDS = [word for topic in TOPICS.values() for word in topic]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's folder, a site's with data, and a run file."""
    root = tmp_path_factory.mktemp("place")
    encoder(root / "base")
    keys.server_init(root / "server", ["127.0.0.1"])
    lines = [
        f"{FILLERS[i % 10]} {word},{'Tier' if topic == 'animals' else topic}"
        for i in range(8)
        for topic, words in TOPICS.items()
        for word in words
    ]
    (root / "mine.csv").write_text("\n".join(["satz,thema", *lines]) + "\n")
    (root / "run.toml").write_text(
        '[model]\nname = "base"\ntask = "text-classification"\n[data]\nlabels = ["animals", "tools", "fruit"]\n'
        '[adapter]\nrank = 4\n[algorithm]\nname = "flexlora"\n'
    )
    return root


def made(place: Path, tmp_path: Path, port: int, **changes: str) -> Path:
    folder = tmp_path / "north"
    columns = {"text": "satz", "label": "thema"}
    keys.site_init(
        folder,
        "north",
        f"127.0.0.1:{port}",
        ca=place / "server" / "ca.pem",
        train=str(place / "mine.csv"),
        columns=columns,
    )
    file = folder / "site.toml"
    text = (
        file.read_text().replace("# [data.labels]", "[data.labels]").replace('# "gut" = "benign"', 'Tier = "animals"')
    )
    for old, new in changes.items():
        text = text.replace(old, new)
    file.write_text(text)
    return folder


def run_of(place: Path) -> RunConfig:
    return load(place / "run.toml")


def by_name(lines: Any) -> dict[str, Line]:
    return {line.name: line for line in lines}


def test_a_site_in_order_passes_everything(place: Path, tmp_path: Path) -> None:
    with listening(place / "server") as port:
        found = by_name(check(made(place, tmp_path, port), run_of(place)))
    assert list(found) == ["site.toml", "key", "data", "limits", "model", "one local step", "server", "certificate"]
    assert {line.ok for line in found.values()} == {True}
    assert re.search(r"120 examples: \d+ fit, \d+ holdout, \d+ test", found["data"].said)
    assert "rank 4" in found["model"].said
    assert "824 days left" in found["certificate"].said
    shown = "\n".join(map(str, found.values()))
    assert not any(re.search(rf"\b{word}\b", shown) for word in (*WORDS, "Tier", "thema", "satz"))


def test_without_a_run_file_data_and_server_are_tried(place: Path, tmp_path: Path) -> None:
    with listening(place / "server") as port:
        found = by_name(check(made(place, tmp_path, port)))
    assert found["data"].ok
    assert found["model and training"].ok is None
    assert found["certificate"].ok


@pytest.mark.parametrize(
    ("old", "new", "name", "words"),
    [
        ('label = "thema"', 'label = "tema"', "data", ["no column 'tema'", "nearest: 'thema'"]),
        ('Tier = "animals"', 'Tier = "animal"', "data", ["no label 'animal'", "nearest: 'animals'"]),
        ('algorithms = "built-in"', 'algorithms = ["fedit"]', "limits", ["'flexlora' is not allowed", "[allow]"]),
        ("[model]", '[model]\nbase = "nowhere/at-all"', "model", ["nowhere/at-all"]),
        ("# rank = 4  ", 'memory = "1 kB" ', "model", ["memory = 1,000 bytes"]),
        ('ca = "ca.pem"', 'ca = "none.pem"', "certificate", ["none.pem", "copy ca.pem"]),
    ],
)
def test_what_is_wrong_has_its_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, name: str, words: list[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with listening(place / "server") as port:
        folder = made(place, tmp_path, port, **{old: new})
        line = by_name(check(folder, run_of(place)))[name]
    assert line.ok is False
    assert line.remedy
    for word in words:
        assert word in str(line)


def test_a_rank_that_the_algorithm_cannot_serve_is_said(place: Path, tmp_path: Path) -> None:
    folder = made(place, tmp_path, 9, **{"# rank = 4  ": "rank = 2 "})
    assert "rank 2" in by_name(check(folder, run_of(place)))["model"].said  # flexlora serves it
    config = run_of(place).replace(algorithm={"name": "fdlora"})
    line = by_name(check(folder, config))["model"]
    assert line.ok is False
    assert "ranks must be equal, but client 'north' has rank 2" in line.said
    assert "the same rank" in line.remedy
    given = run_of(place).replace(clients={"ranks": [2, 4]})  # the largest is served
    assert "rank 4" in by_name(check(made(place, tmp_path / "other", 9), given))["model"].said


def test_a_server_that_is_not_there_or_not_the_right_one(place: Path, tmp_path: Path) -> None:
    with listening(place / "server") as port:
        folder = made(place, tmp_path, port)
        keys.server_init(tmp_path / "other", ["127.0.0.1"])
        (folder / "ca.pem").write_bytes((tmp_path / "other" / "ca.pem").read_bytes())
        line = by_name(check(folder))["certificate"]
        assert line.ok is False
        assert "ca.pem" in line.remedy
    line = by_name(check(folder))["server"]  # nobody listens any more
    assert line.ok is False
    assert "refused" in line.said


def test_an_expired_certificate_says_how_to_renew_it(place: Path, tmp_path: Path) -> None:
    keys.server_init(tmp_path / "server", ["127.0.0.1"], days=-1)
    with listening(tmp_path / "server") as port:
        folder = made(place, tmp_path, port)
        (folder / "ca.pem").write_bytes((tmp_path / "server" / "ca.pem").read_bytes())
        line = by_name(check(folder))["certificate"]
    assert "expired" in line.said
    assert "--renew" in line.remedy


def test_the_commands(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def call(*words: str) -> str:
        result = runner.invoke(app, list(words))
        if isinstance(result.exception, UserError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    assert "ca.key" in call("server", "init", "--host", "127.0.0.1")
    assert "site check north" in call("site", "init", "north", "--server", "127.0.0.1:9", "--ca", "server/ca.pem")
    assert "server/allowed/north.pub" in call("server", "allow", "north/site.pub", "--name", "north")
    with pytest.raises(UserError, match="checks failed"):
        call("site", "check", "north")


def test_a_model_of_the_site_s_own_and_a_language_model_are_tried(place: Path, tmp_path: Path) -> None:
    encoder(tmp_path / "own")
    (tmp_path / "run.toml").write_text(
        (place / "run.toml").read_text().replace('"base"', f'"{place / "base"}"').replace("flexlora", "pfedlora")
        + f'[clients]\nmodels = ["{place / "base"}"]\n'
    )
    changes = {'# own = "models/mine" ': f'own = "{tmp_path / "own"}" '}
    found = by_name(check(made(place, tmp_path, 9, **changes), load(tmp_path / "run.toml")))
    assert found["model"].ok
    assert found["one local step"].ok, found["one local step"].said

    language_model(tmp_path / "lm")
    lines = [f'{{"q": "{FILLERS[i % 10]} {WORDS[i % 15]} ?", "a": "{WORDS[i % 7]}"}}' for i in range(60)]
    (tmp_path / "qa.jsonl").write_text("\n".join(lines))
    columns = {"prompt": "q", "response": "a"}
    keys.site_init(tmp_path / "lms", "lms", "h:9", train=str(tmp_path / "qa.jsonl"), columns=columns)
    (tmp_path / "lm.toml").write_text(
        f'[model]\nname = "{tmp_path / "lm"}"\ntask = "causal-lm"\n[data]\nprompt = "p"\nresponse = "r"\n'
        '[algorithm]\nname = "fedit"\n'
    )
    found = by_name(check(tmp_path / "lms", load(tmp_path / "lm.toml")))
    assert found["data"].said.startswith("60 examples")
    assert found["one local step"].ok, found["one local step"].said
    assert not found["server"].ok
