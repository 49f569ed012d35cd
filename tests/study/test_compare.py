"""``fedlora compare``: a grid over seeds, tuned on validation rows, and a table that another route confirms."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedlora.data.validation import Validated
from fedlora.errors import UserError
from fedlora.study.compare import Cell, best, combinations, compare, load_study
from fedlora.study.comparison import Measured, Point, rows_of, write_tables
from study import tiny

STUDY = """\
base = "my.toml"
seeds = {seeds}

[grid]
"algorithm" = [{{name = "fedit", finetune_epochs = 1}}, {{name = "local"}}]

[tune]
"training.lr" = [0.001, 0.02]
"""


def study_file(folder: Path, seeds: str = "[0, 1]") -> Path:
    tiny.run_file(folder, data='partition = {by = "dirichlet", clients = 3, alpha = 1.0}\n', training="rounds = 2\n")
    file = folder / "study.toml"
    file.write_text(STUDY.format(seeds=seeds))
    return file


def test_a_study_from_its_file(tmp_path: Path) -> None:
    file, said = study_file(tmp_path), []
    folder = compare(file, tmp_path / "out", say=said.append)
    assert len(said) == 2 * 2 + 2  # both rates on the first seed, the chosen one on the second
    runs = table(folder / "runs.csv")
    assert [(run["cell"], run["seed"]) for run in runs] == [
        (cell, seed) for seed in "01" for cell in ("fedit finetune_epochs=1", "local")
    ]
    for seed in "01":  # identical splits, another one for every seed
        assert len({run["data_hash"] for run in runs if run["seed"] == seed}) == 1
    assert len({run["data_hash"] for run in runs}) == 2
    # the tuned rate is the one with the better best validation score, read from the run folders
    place = folder / "cells" / "fedit-finetune_epochs-1"
    found = {rate: curve(place / f"lr-{rate}" / "seed-0") for rate in ("0.001", "0.02")}
    best = {rate: max(v for _, v, _ in points) for rate, points in found.items()}
    rate = max(best, key=lambda name: best[name])
    assert not (place / ("lr-0.02" if rate == "0.001" else "lr-0.001") / "seed-1").exists()
    # scores at the best round by validation, the mean over seeds and its interval
    scores = []
    for seed in (0, 1):
        points = curve(place / f"lr-{rate}" / f"seed-{seed}")
        scores.append(next(mean for _, v, mean in points if v == max(p[1] for p in points)))
    rows = table(folder / "table.csv")
    row = rows[0]
    assert (row["cell"], row["variant"]) == ("fedit finetune_epochs=1", "finetuned")
    assert math.isclose(float(row["personal"]), statistics.fmean(scores), rel_tol=1e-12)
    half = stats.t.interval(0.95, 1, statistics.fmean(scores), statistics.stdev(scores) / math.sqrt(2))
    assert math.isclose(float(row["personal_halfwidth"]), (half[1] - half[0]) / 2 if scores[0] != scores[1] else 0.0)
    assert "| fedit finetune_epochs=1 · finetuned |" in (folder / "table.md").read_text()
    assert not list(folder.glob("cells/**/memories"))

    # nothing is run twice; a lost run is; seeds may be added
    times = {path: path.stat().st_mtime_ns for path in folder.glob("cells/**/summary.json")}
    lost = place / f"lr-{rate}" / "seed-1" / "summary.json"
    before = json.loads(lost.read_text())["personal"]
    for path in sorted(lost.parent.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    file.write_text(STUDY.format(seeds="[0, 1, 2]"))
    compare(file, tmp_path / "out")
    assert json.loads(lost.read_text())["personal"] == before
    assert all(path.stat().st_mtime_ns == at for path, at in times.items() if path != lost)
    assert len(table(folder / "runs.csv")) == 6
    # a list that is tuned over may grow, since its edge may have been the best; a tried value may not be hidden
    wider = STUDY.replace("[0.001, 0.02]", "[0.001, 0.02, 1e-9]")
    file.write_text(wider.format(seeds="[0, 1, 2]"))
    said.clear()
    compare(file, tmp_path / "out", say=said.append)
    assert len(said) == 2 * 3 + 4
    assert (place / "lr-1e-09" / "seed-0" / "summary.json").exists()
    assert all(path.stat().st_mtime_ns == at for path, at in times.items() if path != lost)
    file.write_text(STUDY.format(seeds="[0, 1, 2]"))
    with pytest.raises(UserError, match=r"1e-09.* not in"):
        compare(file, tmp_path / "out")
    file.write_text(wider.format(seeds="[0, 1, 2]"))
    (tmp_path / "my.toml").write_text((tmp_path / "my.toml").read_text().replace("rounds = 2", "rounds = 1"))
    with pytest.raises(UserError, match="another base"):
        compare(file, tmp_path / "out")


def test_a_cell_that_changed_under_its_name_is_not_read_as_the_old_one(tmp_path: Path) -> None:
    tiny.run_file(tmp_path, data='partition = {by = "iid", clients = 2}\n', training="rounds = 1\n")
    file, out = tmp_path / "study.toml", tmp_path / "out"
    text = 'base = "my.toml"\nseeds = [0]\n{cells}[[cells]]\nname = "mine"\ntraining.lr = {rate}\n'
    other = '[[cells]]\nname = "other"\nalgorithm = {name = "local"}\n'
    for cells in (other, ""):  # the second time without the other cell, whose runs stay
        file.write_text(text.format(cells=cells, rate=0.001))
        compare(file, out)
    file.write_text(text.format(cells=other.replace("local", "fedit"), rate=0.001))
    with pytest.raises(UserError, match=r"'other' with .*local.*fedit.* now"):
        compare(file, out)
    file.write_text(text.format(cells=other, rate=0.02))
    with pytest.raises(UserError, match=r"'mine' with .*0.001.*0.02.* now") as caught:
        compare(file, out)
    place = out / "cells" / "mine"
    assert f"delete {place}" in str(caught.value)
    shutil.rmtree(place)
    compare(file, out)
    assert "lr = 0.02" in (place / "seed-0" / "config.toml").read_text()


def table(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """(round, validation, test) of every evaluation, from the files."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    known = [
        (line["round"], line["validation"]["mean"], line["personal"]["mean"]) for line in lines if "personal" in line
    ]
    return [*known, (summary["rounds"], summary["validation"]["mean"], summary["personal"]["mean"])]


def test_mistakes_are_found_before_anything_runs(tmp_path: Path) -> None:
    file = study_file(tmp_path)
    for old, new, said in (
        ("finetune_epochs", "finetune_epoch", "finetune_epoch"),
        ('"training.lr"', '"training.lrr"', "training.lrr"),
        ("[0.001, 0.02]", "0.02", "not a list"),
        ("seeds = [0, 1]", "seedz = [0]", "seedz"),
        ("my.toml", "your.toml", "your.toml"),
        ("seeds = [0, 1]", "seeds = [0, 1, 0]", "seeds names 0 twice"),
        ('"algorithm" =', 'seed = [3, 4]\n"algorithm" =', "one of the cells sets seed"),
        ("[0.001, 0.02]", "[0.001, 0.001]", r"settings of \[tune\] are called 'lr=0.001'"),
        (
            '"training.lr"',
            '"algorithm.finetune_epochs"',
            r"cell 'fedit finetune_epochs=1' sets algorithm, and \[tune\]",
        ),
        ('"algorithm" =', '"training.lr" = [0.1]\n"algorithm" =', r"sets training.lr, and \[tune\] training.lr would"),
        ("[tune]", '[[cells]]\nname = "x"\ntraining.validate = false\n[tune]', "x: .* training.validate is false"),
    ):
        text = STUDY.format(seeds="[0, 1]")
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=said):
            load_study(file)
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named_and_a_study_without_validation_says_so(tmp_path: Path) -> None:
    file = study_file(tmp_path)
    file.write_text(
        'base = "my.toml"\nseeds = [0]\n[grid]\n"training.validate" = [false]\n"clients.ranks" = [4, [2, 4]]\n'
    )
    with pytest.raises(UserError, match=r"ranks=\[2, 4\], seed 0: .*ranks must be equal"):
        compare(file, tmp_path / "out")
    file.write_text('base = "my.toml"\nseeds = [0]\n[grid]\n"training.validate" = [false]\n"clients.ranks" = [4]\n')
    said = (compare(file, tmp_path / "out") / "table.md").read_text()
    assert "scores are on test rows at the end (no validation rows were kept)." in said


def test_combinations_have_names() -> None:
    cells = combinations({"algorithm": {"name": ["fedit", "flexlora"]}, "clients.ranks": [4, [2, 8]]}, "")
    assert [cell.name for cell in cells] == [
        "fedit ranks=4",
        "fedit ranks=[2, 8]",
        "flexlora ranks=4",
        "flexlora ranks=[2, 8]",
    ]
    assert cells[1].changes == {"algorithm.name": "fedit", "clients.ranks": [2, 8]}
    assert [cell.name for cell in combinations({}, "")] == ["run"]


def test_cells_are_written_out(tmp_path: Path) -> None:
    file = study_file(tmp_path)
    cells = """
[[cells]]
name = "private heads"
algorithm = {name = "head-only"}
adapter = {extras = {head = "private"}}

[[cells]]
name = "slow"
training.epochs = 7
"""
    file.write_text(STUDY.format(seeds="[0]") + cells)
    study = load_study(file)
    names = ["fedit finetune_epochs=1", "local", "private heads", "slow"]
    assert [cell.name for cell in study.cells] == names
    _, _, private, slow = (study.config(cell, Cell("", {}), 0) for cell in study.cells)
    assert private.algorithm.name == "head-only"
    assert private.adapter.extras.head == "private"
    assert private.adapter.rank == slow.adapter.rank
    assert slow.training.epochs == 7
    assert slow.training.rounds == private.training.rounds == 2
    for text, said in (('name = "slow"', ""), ('"private heads"', '"local"')):
        file.write_text(STUDY.format(seeds="[0]") + cells.replace(text, said))
        with pytest.raises(UserError, match="has no name" if not said else "two cells are called 'local'"):
            load_study(file)


def test_no_validation_row_is_trained_on() -> None:
    rng = np.random.default_rng(0)
    clients = {}
    for client in range(30):
        rows = rng.permutation(1000)[: int(rng.integers(3, 200))]
        cut = sorted(int(c) for c in rng.integers(1, len(rows) + 1, 2))
        clients[str(client)] = dict(zip(("fit", "holdout", "test"), np.split(rows, cut), strict=True))
    apart = Validated(clients, seed=4)
    for name, own in clients.items():
        made = apart[name]
        assert set(made["fit"]) | set(made["holdout"]) == set(own["fit"])
        assert len(made["fit"]) + len(made["holdout"]) == len(own["fit"])
        assert len(made["fit"]) >= 1
        assert made["validation"] is own["holdout"]
        assert made["test"] is own["test"]


def run(cell: str, seed: int, scores: list[float], **changes: object) -> Measured:
    points = tuple(
        Point(
            t,
            -abs(t - 2.0),
            score,
            0.0,
            score,
            None,
            3.0 * t,
            {"own": {"mean": score, "std": 0.0, "worst_decile": score}},
        )
        for t, score in enumerate(scores, 1)
    )
    return Measured(cell, seed, "accuracy", True, "", 0.5, points, None, 1.0, 2.0, 3.0, None)


def test_differences_are_paired_and_targets_need_every_seed() -> None:
    runs = [
        run("a", 0, [0.1, 0.5, 0.9]),
        run("b", 0, [0.1, 0.6, 0.6]),
        run("a", 1, [0.2, 0.3, 0.3]),
        run("b", 1, [0.5, 0.5, 0.5]),
    ]
    rows = {row.cell: row for row in rows_of(runs, ["a", "b"], target=0.5)}
    assert rows["a"].columns["best_round"] == (2.0, 0.0)  # by validation, although the test score rises further
    assert rows["a"].columns["personal"] is not None
    assert math.isclose(rows["a"].columns["personal"][0], 0.4)
    difference = rows["b"].columns["difference"]
    assert difference is not None
    assert math.isclose(difference[0], 0.15)  # (0.1 + 0.2) / 2
    assert rows["a"].columns["rounds_to_target"] is None  # its second seed never got there
    assert rows["b"].columns["rounds_to_target"] == (1.5, pytest.approx(stats.t.ppf(0.975, 1) * 0.5))
    assert rows["b"].columns["mb_to_target"] == (4.5, pytest.approx(stats.t.ppf(0.975, 1) * 1.5))


def test_a_setting_that_diverged_is_not_chosen_and_leaves_the_target_open(tmp_path: Path) -> None:
    lost = replace(run("a", 0, [0.1]), curve=(Point(1, None, None, None, None, None, 3.0, {}),))
    settings = [Cell("lr=1e20", {}), Cell("lr=0.01", {})]
    assert best([(lost, settings[0]), (run("a", 0, [0.1]), settings[1])]) is settings[1]
    with pytest.raises(UserError, match="no finite validation score"):
        best([(lost, settings[0]), (lost, settings[1])])
    write_tables(tmp_path, [lost], ["a"], None, {})
    assert "no run has a score" in (tmp_path / "table.md").read_text()
