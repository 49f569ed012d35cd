"""A finished run on other data, and what is no run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import UserError
from fedlora.study.after import evaluate, personalize
from fedlora.study.config import load
from fedlora.study.export import export
from fedlora.study.predict import predict
from fedlora.study.run import resume, run
from study import tiny


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of clients that hold few rows each."""
    folder = tmp_path_factory.mktemp("user")
    file = tiny.run_file(
        folder, training="rounds = 1\nsteps = 1\n", data="partition = {clients = 2}\nper_client = 40\n"
    )
    return run(file, out=folder / "run").folder


def test_all_rows_of_other_data_are_scored(done: Path, tmp_path: Path) -> None:
    """Also where the run's own clients were cut to some rows."""
    other = tiny.reviews(tmp_path / "other.jsonl", 120, seed=5)
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    said = predict(done, [row["text"] for row in rows])
    right = sum(str(answer).split()[0] == row["label"] for answer, row in zip(said, rows, strict=True))
    assert evaluate(done, other)["accuracy"] == pytest.approx(right / len(rows))


def test_a_merged_folder_is_for_transformers(done: Path, tmp_path: Path) -> None:
    folder = export(done, tmp_path / "merged", merge=True)
    with pytest.raises(UserError, match=r"merged: a whole \(merged\) model, .*\n  -> load it with transf"):
        predict(folder, ["one pear"])


def test_half_characters_are_refused(done: Path) -> None:
    with pytest.raises(UserError, match=r"--text 'one \\udce4': '\\udce4' is no character"):
        predict(done, ["one pear", "one \udce4"])


@pytest.mark.parametrize("name", ["(everyone)", "(all data pooled)"])
def test_no_client_is_called_as_all_of_them(tmp_path: Path, name: str) -> None:
    """It would never train, and everybody's rows would be taken for its own."""
    file = tiny.run_file(tmp_path, data='partition = {column = "owner"}\n')
    data = tmp_path / "mine.jsonl"
    rows = [json.loads(line) | {"owner": [name, "b"][i % 2]} for i, line in enumerate(data.read_text().splitlines())]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"called '{re.escape(name)}', which stands for all"):
        run(file, out=tmp_path / "run")


def test_one_text_is_no_list_of_characters(done: Path) -> None:
    with pytest.raises(UserError, match=r"one text was given, 'pear', not several\n  -> give a list"):
        predict(done, "pear")


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_program_without_gradients_trains_all_the_same(tmp_path: Path, off: Any) -> None:
    changes = ["algorithm.finetune_epochs=1", "training.rounds=1"]
    config = load(tiny.run_file(tmp_path, data="partition = {clients = 2}\n"), changes)
    other = tiny.reviews(tmp_path / "other.jsonl", 60, seed=5)
    places = [run(config, out=tmp_path / "on").folder]
    newcomers = [personalize(places[0], other)[0]]
    with off():
        places.append(run(config, out=tmp_path / "off").folder)
        newcomers.append(personalize(places[1], other)[0])
        assert not torch.is_grad_enabled()
    for folders in ([place / "adapters" / "global" for place in places], newcomers):
        one, two = ((folder / "adapter_model.safetensors").read_bytes() for folder in folders)
        assert one == two


def test_a_newcomer_needs_a_name(done: Path) -> None:
    with pytest.raises(UserError, match=r"--client ' ': a client needs a name"):
        personalize(done, "other.jsonl", client=" ")


def test_newcomers_of_an_earlier_round_are_named_and_made_anew(tmp_path: Path) -> None:
    file = tiny.run_file(tmp_path, training="rounds = 1\nepochs = 2\n", data="partition = {clients = 2}\n")
    place = run(file, out=tmp_path / "run").folder
    other = tiny.reviews(tmp_path / "other.jsonl", 60, seed=5)
    adapter, _ = personalize(place, other, client="late")
    before = (adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="'late' is there already"):
        personalize(place, other, client="late")
    resume(place, rounds=2)
    assert "the adapter of 'late', who came at round 1, is not of this one" in (place / "run.log").read_text()
    assert personalize(place, other, client="late")[0] == adapter
    assert (adapter / "adapter_model.safetensors").read_bytes() != before
    said = len((place / "run.log").read_text())
    resume(place)
    assert "'late'" not in (place / "run.log").read_text()[said:]
    with pytest.raises(UserError, match="a client '0' is there already"):
        personalize(place, other, client="0")


@pytest.mark.parametrize("sections", [{"trainin": {"rounds": 1}}, {"rounds": 1}, {"training": 3}])
def test_sections_replaced_in_a_call_are_checked(tmp_path: Path, sections: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"configuration: (unknown key '(trainin|rounds)'|'training' = 3)"):
        run(tiny.run_file(tmp_path), out=tmp_path / "run", **sections)
