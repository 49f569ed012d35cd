"""Reading examples: files, folders and hub datasets, with the line of everything that is wrong. Nothing is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal
from uuid import uuid4

import datasets
import numpy as np
import pyarrow as pa

from fedlora.data.formats import READERS, Part, of_dataset, stack
from fedlora.data.keys import listed, nearest
from fedlora.errors import UserError

Split = Literal["train", "validation", "test"]
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "fit": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "holdout": "validation",
    "test": "test",
}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_HIDDEN = (".", "~$", "Thumbs.db", "desktop.ini")
_HUB_ID = re.compile(r"^([\w.-]+(?:/[\w.-]+)?)(?:@([\w.-]+))?$")


def read(source: str | Path, split: Split = "train") -> datasets.Dataset:
    """All rows and columns of a file, folder or hub dataset; `split` picks among a folder's or hub dataset's splits.

    Raises `UserError` that names the file and line of what cannot be read. Columns that one file lacks are null there.
    """
    return dataset(stack([part.table for part in parts(source, split)]))


def dataset(table: pa.Table) -> datasets.Dataset:
    """A table as a dataset, without the copy that naming it by its content would make."""
    return datasets.Dataset(table, fingerprint=uuid4().hex[:16])


def parts(source: str | Path, split: Split = "train") -> list[Part]:
    """The files behind one source, each read whole. Raises `UserError` for what is missing, empty or unreadable."""
    where, wanted = _wanted_split(str(source))
    path = Path(where).expanduser()
    if path.is_dir():
        found = _saved(path, split, wanted) or _folder(path, _split_named(path, wanted) if wanted else split)
    elif path.is_file():
        found = [_file(path)]
        if wanted:
            found = [_rows_of_split(part, wanted) for part in found]
    else:
        found = [_hub(where, wanted or split)]
    for part in found:
        if part.table.num_rows == 0:
            raise UserError(f"{part.name} holds no examples", "give a file with at least one row, or leave it out")
    return found


def _wanted_split(source: str) -> tuple[str, str | None]:
    """'data.parquet:test' -> ('data.parquet', 'test'); a path that exists as written keeps its colon."""
    head, colon, tail = source.rpartition(":")
    if not colon or not re.fullmatch(r"\w+", tail) or len(head) < 2 or Path(source).expanduser().exists():
        return source, None
    return head, tail


def _split_named(folder: Path, wanted: str) -> Split:
    if (found := SPLIT_NAMES.get(wanted.casefold())) is None:
        raise UserError(
            f"{folder}:{wanted}: a folder has no split of that name{nearest(wanted, SPLIT_NAMES)}",
            "write train, validation or test, or name a file of the folder",
        )
    return found


def _rows_of_split(part: Part, wanted: str) -> Part:
    if "split" not in part.table.column_names:
        raise UserError(
            f"{part.name}:{wanted}: the file has no column 'split'; it has {listed(part.table.column_names)}",
            "drop the ending, or add that column",
        )
    said = [str(value) for value in part.table["split"].to_pylist()]
    rows = np.array([row for row, value in enumerate(said) if value == wanted], dtype=np.int64)
    if not len(rows):
        values = sorted(set(said))
        raise UserError(
            f"{part.name}: no row has {wanted!r} in its column 'split'; there are {listed(values)}"
            f"{nearest(wanted, values)}",
            f"write {part.name}:NAME with one of them",
        )
    return replace(part, table=part.table.take(rows), places=part.places[rows])


# ---------------------------------------------------------------------------------------------- folders


def _folder(folder: Path, split: Split) -> list[Part]:
    """A folder of data files, or of one sub-folder of images per label; a split of its own name is preferred."""
    entries = _shown(folder)
    inner = [d for d in entries if d.is_dir() and split_of(d) == split]
    if inner:
        return _beside_them([part for d in inner for part in _folder(d, split)], entries, inner)
    files = [f for f in entries if f.is_file() and f.suffix.lower() in READERS]
    if any(map(split_of, files)):  # a folder with train.csv and test.csv must never train on both
        files = [f for f in files if split_of(f) == split]
    if files:
        return _beside_them([_with_file_name(_file(f), f.stem) for f in files], entries, files)
    classes = [d for d in entries if d.is_dir()]
    within = [f for d in classes for f in _shown(d)]
    images = [f for f in within if f.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        table = pa.table({"image": [str(f) for f in images], "label": [f.parent.name for f in images]})
        found = [Part(str(folder), table, "row", np.arange(1, len(images) + 1), folder)]
        return _beside_them(found, [*entries, *within], [*classes, *images])
    raise UserError(
        f"folder {folder} holds no {split} data",
        f"put {', '.join(sorted(READERS))} files there, or images in one sub-folder per label",
    )


def _shown(folder: Path) -> list[Path]:
    """What is in a folder, but for what systems and office programs hide there (._a.csv, ~$a.csv)."""
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(_HIDDEN)]


def split_of(path: Path) -> Split | None:
    """The split that a folder's name is, or a file's name begins with.

    >>> split_of(Path("test-2.csv")), split_of(Path("testing.csv"))
    ('test', None)
    """
    name = path.name.casefold() if path.is_dir() else re.split(r"[\W_\d]", path.stem.casefold())[0]
    return SPLIT_NAMES.get(name)


def _beside_them(found: list[Part], entries: list[Path], taken: list[Path]) -> list[Part]:
    """The parts, the first of which knows what else lay there that looks like data."""
    known = set(taken)
    left = [path for path in entries if path not in known and _looks_like_data(path)]
    return [replace(found[0], unread=(*found[0].unread, *left)), *found[1:]]


def _looks_like_data(path: Path) -> bool:
    if path.is_dir():
        return split_of(path) is not None or any(f.suffix.lower() in {*READERS, *IMAGE_SUFFIXES} for f in _shown(path))
    return path.suffix.lower() not in (".md", ".toml", ".py") and path.stem.casefold() not in ("readme", "license")


def _saved(folder: Path, split: Split, wanted: str | None) -> list[Part]:
    """What `save_to_disk` of the datasets library wrote there: a dataset, or one of several by name; [] if nothing."""
    names: list[str] = []
    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        chosen = wanted or next((name for name in names if SPLIT_NAMES.get(name.casefold()) == split), split)
        if chosen not in names:
            raise UserError(
                f"{folder}: the saved datasets are {listed(names)}, not {chosen!r}{nearest(chosen, names)}",
                f"write {folder}:NAME with one of them",
            )
        place = folder / chosen
    elif (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        place = folder
    else:
        return []
    try:
        data = datasets.load_from_disk(str(place))
    except Exception as error:  # missing or damaged files: the library raises a dozen types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{place}: a saved dataset that cannot be read: {reason}", "save it anew") from None
    assert isinstance(data, datasets.Dataset)
    part = replace(of_dataset(data, str(place)), folder=place, unread=tuple(folder / n for n in names))
    return [_rows_of_split(part, wanted) if wanted and not names else part]


def _with_file_name(part: Part, stem: str) -> Part:
    """Adds the column `file`, so that `partition = {column = "file"}` makes one client per file."""
    if "file" in part.table.column_names:
        return part
    return replace(part, table=part.table.append_column("file", pa.array([stem] * part.table.num_rows, pa.string())))


# ---------------------------------------------------------------------------------------------- files


def _file(path: Path) -> Part:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}: files ending in {path.suffix or 'nothing'!r} cannot be read",
            f"convert it to one of {', '.join(sorted(READERS))}",
        )
    try:
        return reader(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened: {error.strerror or error}", "check the path and its rights"
        ) from None


# ---------------------------------------------------------------------------------------------- hub


def _hub(name: str, split: str) -> Part:
    match = _HUB_ID.match(name)
    if match is None or Path(name).suffix.lower() in READERS:
        raise UserError(f"{name} does not exist{_beside(Path(name))}", "check the path (relative to where you run)")
    try:
        data = datasets.load_dataset(match[1], name=match[2], split=split)
    except Exception as error:  # the hub's client raises a dozen types: network, rights, names, splits
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name!r} (split {split!r}) is neither a file or folder here nor a hub dataset that can be read: {reason}",
            "check the name and the network; write owner/name@config:split to choose among configurations and splits",
        ) from None
    assert isinstance(data, datasets.Dataset)
    return of_dataset(data, f"{name}:{split}")


def _beside(path: Path) -> str:
    try:
        return nearest(path.name, (p.name for p in path.expanduser().parent.iterdir()))
    except OSError:
        return f" (nor does the folder {path.parent})"


def many(sources: str | Iterable[str], split: Split) -> list[Part]:
    """The parts of one source or of several, in order."""
    return [part for source in ([sources] if isinstance(sources, str) else sources) for part in parts(source, split)]
