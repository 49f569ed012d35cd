"""Reading examples: files, folders and hub datasets, with the line of everything that is wrong. Nothing is written."""

from __future__ import annotations

import re
from collections.abc import Iterable
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
        found = _folder(path, SPLIT_NAMES.get(wanted or "", split))
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
    return Part(part.name, part.table.take(rows), part.unit, part.places[rows], part.folder)


# ---------------------------------------------------------------------------------------------- folders


def _folder(folder: Path, split: Split) -> list[Part]:
    """A folder of data files, or of one sub-folder of images per label; a split of its own name is preferred."""
    inner = [d for d in sorted(folder.iterdir()) if d.is_dir() and SPLIT_NAMES.get(d.name.casefold()) == split]
    if inner:
        return [part for d in inner for part in _folder(d, split)]
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and f.suffix.lower() in READERS]
    named = {f: SPLIT_NAMES.get(re.split(r"[\W_\d]", f.stem.casefold())[0]) for f in files}
    if any(named.values()):  # a folder with train.csv and test.csv must never train on both
        files = [f for f, name in named.items() if name == split]
    if files:
        return [_with_file_name(_file(f), f.stem) for f in files]
    images = [f for f in sorted(folder.glob("*/*")) if f.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        table = pa.table({"image": [str(f) for f in images], "label": [f.parent.name for f in images]})
        return [Part(str(folder), table, "row", np.arange(1, len(images) + 1), folder)]
    raise UserError(
        f"folder {folder} holds no {split} data",
        f"put {', '.join(sorted(READERS))} files there, or images in one sub-folder per label",
    )


def _with_file_name(part: Part, stem: str) -> Part:
    """Adds the column `file`, so that `partition = {column = "file"}` makes one client per file."""
    if "file" in part.table.column_names:
        return part
    table = part.table.append_column("file", pa.array([stem] * part.table.num_rows, pa.string()))
    return Part(part.name, table, part.unit, part.places, part.folder)


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
