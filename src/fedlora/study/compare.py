"""``fedlora compare``: a grid of runs over seeds on identical splits, resumable, and the table that comes of it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fedlora.errors import UserError
from fedlora.study import folder as files
from fedlora.study.algorithm import build
from fedlora.study.comparison import Measured, measured, write_tables
from fedlora.study.config import RunConfig, Section, apply, assign, located, parse, read
from fedlora.study.run import resume, run

Changes = Mapping[str, Any]


class StudySettings(Section):
    """A study file. ``base``: the run file, or its tables written out; ``grid``: dotted keys to the values that are
    compared, all combinations; ``cells``: what no grid says, each a ``name`` and the tables or dotted keys that it
    sets; the first of all is the reference; ``tune``: dotted keys to values, of which every cell
    takes the combination with the best validation score on the first seed; ``target``: a score, for "until target"
    (default: the least of the cells' best, which every cell reached); ``keep``: also keep client memories and
    checkpoints of finished runs."""

    base: str | dict[str, Any]
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    grid: dict[str, Any] = {}
    cells: list[dict[str, Any]] = []
    tune: dict[str, Any] = {}
    target: float | None = None
    keep: bool = False


@dataclass(frozen=True)
class Cell:
    """One combination of the grid: its name in tables and folders, and the keys that it sets."""

    name: str
    changes: Changes

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return files.safe(self.name.replace("/", "-"))


@dataclass(frozen=True)
class Study:
    """A study, read and checked. ``base``: the run file's tables; ``folder``: where the grid's paths begin;
    ``settings``: the combinations to tune over (one empty one where nothing is tuned)."""

    base: Mapping[str, Any]
    folder: Path
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    settings: tuple[Cell, ...]
    target: float | None
    keep: bool

    def config(self, cell: Cell, setting: Cell, seed: int) -> RunConfig:
        """The run of a cell. The split's seed is the run's, unless the base states one; validation rows are apart."""
        value: dict[str, Any] = json.loads(json.dumps(self.base))
        value["seed"] = seed
        value.setdefault("data", {}).setdefault("seed", seed)
        value.setdefault("training", {}).setdefault("validate", True)
        value.setdefault("output", {}).setdefault("client_adapters", "none")
        for key, entry in {**cell.changes, **setting.changes}.items():
            assign(value, key, entry)
        return parse(located(value, self.folder), f"{cell.name}, seed {seed}")


def load_study(path: str | Path, changes: Sequence[str] = ()) -> Study:
    """Reads a study file and checks every cell before anything runs: UserError names the cell and the key.

    ``changes``: ``section.key=value`` of the base.
    """
    file = Path(path)
    try:
        settings = StudySettings.model_validate(read(file))
    except ValidationError as error:
        said = "; ".join(f"'{'.'.join(map(str, p['loc']))}': {p['msg']}" for p in error.errors())
        raise UserError(f"{file}: {said}", f"a study file has {', '.join(StudySettings.model_fields)}") from None
    given = settings.base  # tables, or the name of a run file beside the study file
    place = file if isinstance(given, dict) else file.parent / given
    base = located(given if isinstance(given, dict) else read(place), place.parent)
    for change in changes:
        apply(base, change)
    cells = (
        *(combinations(settings.grid, f"{file}: [grid]") if settings.grid or not settings.cells else ()),
        *(_written(cell, f"{file}: [[cells]]") for cell in settings.cells),
    )
    tuned = combinations(settings.tune, f"{file}: [tune]")
    _require_sound(settings, cells, tuned, file)
    study = Study(base, file.parent, tuple(settings.seeds), cells, tuned, settings.target, settings.keep)
    for cell, setting in itertools.product(cells, tuned):
        config = study.config(cell, setting, study.seeds[0])
        build(config)
        if settings.tune and not config.training.validate_rounds:
            raise UserError(
                f"{file}: {cell.name}: [tune] chooses by validation rows, and training.validate is false",
                "leave validate out (a study keeps these rows apart by itself), or leave out [tune]",
            )
    return study


def _require_sound(settings: StudySettings, cells: Sequence[Cell], tuned: Sequence[Cell], file: Path) -> None:
    """Every run has a name, a folder and a seed of its own, and no key is set twice."""
    for kind, made in (("cells", cells), ("settings of [tune]", tuned)):
        slugs = [cell.slug for cell in made]
        if twice := [cell for cell in made if slugs.count(cell.slug) > 1]:
            raise UserError(
                f"{file}: two {kind} are called {twice[0].name!r}, or share the folder {twice[0].slug!r}",
                "leave one out, or give it another name",
            )
        if any("seed" in cell.changes for cell in made):
            raise UserError(f"{file}: one of the {kind} sets seed", "name all seeds in seeds = [...]")
    if again := [seed for seed in settings.seeds if settings.seeds.count(seed) > 1]:
        raise UserError(f"{file}: seeds names {again[0]} twice", "one seed is one run")
    for cell, key in itertools.product(cells, tuned[0].changes):
        if (own := _sets(cell.changes, key)) is not None:
            raise UserError(
                f"{file}: cell {cell.name!r} sets {own}, and [tune] {key} would replace it",
                f"leave {key} out of [tune], or {own} out of the cells",
            )


def _sets(changes: Changes, key: str) -> str | None:
    """The key by which a cell states what ``key`` names: itself, a part of it, or a table that has it.

    >>> _sets({"algorithm": {"name": "fedit", "proximal": 0.1}}, "algorithm.proximal")
    'algorithm'
    >>> _sets({"algorithm": {"name": "fedit"}, "training.lr": 0.1}, "algorithm.proximal") is None
    True
    """
    for stated, value in changes.items():
        inside: Any = value
        if key == stated or stated.startswith(f"{key}."):
            return stated
        if not key.startswith(f"{stated}."):
            continue
        for name in key.removeprefix(f"{stated}.").split("."):
            inside = inside.get(name) if isinstance(inside, Mapping) else None
        if inside is not None:
            return stated
    return None


def combinations(table: Mapping[str, Any], place: str) -> tuple[Cell, ...]:
    """All combinations of a table of dotted keys to lists, the last key changing fastest.

    >>> [cell.name for cell in combinations({"algorithm.name": ["fedit", "local"], "training": {"lr": [0.1]}}, "")]
    ['fedit', 'local']
    >>> [cell.name for cell in combinations({"training.lr": [0.1, 0.2]}, "")]
    ['lr=0.1', 'lr=0.2']
    """
    keys = dict(_flat(table, "", place))
    shown = [key for key, values in keys.items() if len(values) > 1 or len(keys) == 1]
    made: list[Cell] = []
    for values in itertools.product(*keys.values()):
        chosen = dict(zip(keys, values, strict=True))
        made.append(Cell(" ".join(_label(key, chosen[key]) for key in shown) or "run", chosen))
    return tuple(made)


def _written(table: Mapping[str, Any], place: str) -> Cell:
    """A cell that is written out: its tables set single keys, ``algorithm`` the whole section."""
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{place}: one has no name", 'for example name = "head-only, private"')
    changes: dict[str, Any] = {}
    for section, value in table.items():
        if section == "name":
            continue
        if section == "algorithm" or not isinstance(value, Mapping):
            changes[section] = value
        else:
            entries: Mapping[str, Any] = value
            changes |= {f"{section}.{key}": entry for key, entry in entries.items()}
    return Cell(name, changes)


def _flat(table: Mapping[str, Any], prefix: str, place: str) -> Iterator[tuple[str, list[Any]]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.", place)
        elif isinstance(value, list) and value:
            yield f"{prefix}{key}", value
        else:
            raise UserError(
                f"{place} {prefix}{key} = {value!r}: not a list of values", 'for example "training.lr" = [0.001, 0.002]'
            )


def _label(key: str, value: Any) -> str:
    """What a combination is called: an algorithm's name, else key=value; tables by their entries."""
    if isinstance(value, Mapping):
        entries: Mapping[str, Any] = value
        rest = (_label(name, entry) for name, entry in entries.items() if name != "name")
        return " ".join([*([str(entries["name"])] if "name" in entries else []), *rest])
    return str(value) if key == "algorithm.name" else f"{key.rpartition('.')[2]}={value}"


def compare(
    study: Study | str | Path,
    out: str | Path | None = None,
    *,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Runs what is not yet run, writes ``table.csv``, ``table.md`` and ``runs.csv``, and gives the folder back.

    The tables are there after the first seed. What is finished is read, what was interrupted is resumed; seeds, grid
    and the values that are tuned over may grow between calls, the base and cells that have runs may not change. Raises
    UserError where the cells of a seed saw different data although the grid sets no ``data`` key.
    """
    name = "study" if isinstance(study, Study) else Path(study).stem
    study = study if isinstance(study, Study) else load_study(study)
    folder = Path(out) if out is not None else Path("runs") / f"compare-{name}"
    _claim(folder, study)
    runs: list[Measured] = []
    chosen: dict[str, Cell] = {}
    for seed in study.seeds:
        for cell in study.cells:
            candidates = study.settings if cell.name not in chosen else (chosen[cell.name],)
            found: list[tuple[Measured, Cell]] = []
            for setting in candidates:
                found.append((_run(study, cell, setting, seed, folder, progress), setting))
                name = ", ".join([cell.name, *([setting.name] if setting.changes else []), f"seed {seed}"])
                say(f"{name}: {found[-1][0].line}")
            chosen[cell.name] = best(found)
            runs += [one for one, setting in found if setting is chosen[cell.name]]
        if not any(key.split(".")[0] == "data" for cell in study.cells for key in cell.changes):
            _same_data(runs)
        tuned = {cell: setting.name for cell, setting in chosen.items() if setting.changes}
        write_tables(folder, runs, [cell.name for cell in study.cells], study.target, tuned)
    return folder


def best(found: Sequence[tuple[Measured, Cell]]) -> Cell:
    """The setting whose run has the best validation score at its best round; the first of equals."""
    if len(found) == 1:
        return found[0][1]
    known = [(run, setting) for run, setting in found if run.validation is not None]
    if not known:
        raise UserError(
            f"{found[0][0].cell}: no finite validation score to tune by",
            "give clients more examples, or other values in [tune], or leave it out",
        )
    sign = 1 if known[0][0].higher_is_better else -1
    return max(known, key=lambda pair: sign * (pair[0].validation or 0.0))[1]


def _run(study: Study, cell: Cell, setting: Cell, seed: int, folder: Path, progress: bool) -> Measured:
    """One run: read where it is finished, resumed where it was interrupted."""
    place = folder / "cells" / cell.slug / (setting.slug if setting.changes else "") / f"seed-{seed}"
    if not (place / "summary.json").exists():
        try:
            if (place / "config.toml").exists():
                resume(place, progress=progress)
            else:
                shutil.rmtree(place, ignore_errors=True)  # stopped before it began
                run(study.config(cell, setting, seed), out=place, progress=progress)
        except UserError as error:
            raise UserError(f"{cell.name}, seed {seed}: {error}") from None
    if not study.keep:
        for part in ("memories", "checkpoints"):
            shutil.rmtree(place / part, ignore_errors=True)
    return measured(place, cell.name, seed)


def _claim(folder: Path, study: Study) -> None:
    """A study's folder holds runs of one base; what was tuned over stays among what is tuned over (a list whose best
    value is its last may grow), or a cell could keep a setting that is not in the study. A cell that has runs sets
    what it set then: its name need not tell every value."""
    known = folder / "study.json"
    cells = {cell.slug: json.loads(json.dumps(cell.changes)) for cell in study.cells}
    value = {
        "base": json.loads(json.dumps(study.base)),
        "tune": [dict(cell.changes) for cell in study.settings],
        "cells": cells,
    }
    if known.exists():
        before = json.loads(known.read_text())
        if before["base"] != value["base"]:
            raise UserError(f"{folder}: holds runs of another base", "choose another --out, or delete what is there")
        lost = [setting for setting in before["tune"] if setting not in value["tune"]]
        if lost:
            raise UserError(
                f"{folder}: holds runs tuned over {lost[0] or 'nothing'}, which is not in [tune] now",
                "values may be added, not taken away: choose another --out",
            )
        ran = {slug: keys for slug, keys in before.get("cells", {}).items() if (folder / "cells" / slug).exists()}
        for cell in study.cells:
            if ran.get(cell.slug, cells[cell.slug]) != cells[cell.slug]:
                raise UserError(
                    f"{folder}: holds runs of {cell.name!r} with {ran[cell.slug]}, which sets {cells[cell.slug]} now",
                    f"choose another --out, or delete {folder / 'cells' / cell.slug}",
                )
        value["cells"] = ran | cells  # also of cells that this study leaves out: their runs are there
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(known, value)


def _same_data(runs: Sequence[Measured]) -> None:
    for seed in {one.seed for one in runs}:
        hashes = {one.data_hash: one.cell for one in runs if one.seed == seed}
        if len(hashes) > 1:
            raise UserError(
                f"seed {seed}: {', '.join(hashes.values())} saw different data",
                "the files have changed since the study began: choose another --out",
            )
