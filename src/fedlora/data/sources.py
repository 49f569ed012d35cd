"""Reading examples: files, folders and hub datasets, with the line of everything that is wrong. Nothing is written."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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


@dataclass(frozen=True)
class Part:
    """One file (or hub split) as read: its columns, and where each row stood."""

    name: str
    table: pa.Table
    unit: Literal["line", "row"]
    places: np.ndarray  # (rows,) int64: the line or row number, from 1
    folder: Path | None = None  # what relative image paths start from

    def place(self, row: int) -> str:
        """'reviews.csv, line 7' for row index 5 of a file with a header."""
        return f"{self.name}, {self.unit} {int(self.places[row])}"


def read(source: str | Path, split: Split = "train") -> datasets.Dataset:
    """All rows and columns of a file, folder or hub dataset; `split` picks among a folder's or hub dataset's splits.

    Raises `UserError` that names the file and line of what cannot be read. Columns that one file lacks are null there.
    """
    return dataset(_stack([part.table for part in parts(source, split)]))


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
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and f.suffix.lower() in _READERS]
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
        f"put {', '.join(sorted(_READERS))} files there, or images in one sub-folder per label",
    )


def _with_file_name(part: Part, stem: str) -> Part:
    """Adds the column `file`, so that `partition = {column = "file"}` makes one client per file."""
    if "file" in part.table.column_names:
        return part
    table = part.table.append_column("file", pa.array([stem] * part.table.num_rows, pa.string()))
    return Part(part.name, table, part.unit, part.places, part.folder)


# ---------------------------------------------------------------------------------------------- files


def _file(path: Path) -> Part:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}: files ending in {path.suffix or 'nothing'!r} cannot be read",
            f"convert it to one of {', '.join(sorted(_READERS))}",
        )
    try:
        return reader(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened: {error.strerror or error}", "check the path and its rights"
        ) from None


def _text_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not UTF-8 text (byte {error.start + 1}: 0x{raw[error.start]:02x})",
                    "save the file as UTF-8",
                ) from None


def _jsonl(path: Path) -> Part:
    tables: list[pa.Table] = []
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    for number, line in enumerate(_text_lines(path), 1):
        if not line.strip():
            continue
        if not places and line.lstrip().startswith("["):
            return _json_array(path)
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}, column {error.colno}: not JSON ({error.msg}): {line.strip()[:60]!r}",
                "every line must be one complete JSON object; repair or remove this one",
            ) from None
        rows.append(_object(value, path, "line", number))
        places.append(number)
        if len(rows) == 2_000:  # Arrow holds text in a third of the memory that Python's objects take
            tables.append(_columns(rows))
            rows = []
    tables += [_columns(rows)] if rows or not tables else []
    return Part(str(path), _stack(tables), "line", np.array(places, dtype=np.int64), path.parent)


def _json_array(path: Path) -> Part:
    try:
        values = json.loads("".join(_text_lines(path)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})",
            "the file must be one array of objects, or one object a line",
        ) from None
    rows = [_object(value, path, "row", number) for number, value in enumerate(values, 1)]
    return Part(str(path), _columns(rows), "row", np.arange(1, len(rows) + 1), path.parent)


def _object(value: Any, path: Path, unit: str, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{path}, {unit} {number}: {str(value)[:40]!r} is not an object", 'write {"text": "...", "label": "..."}'
        )
    return value


def _columns(rows: Sequence[dict[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _array([row.get(name) for row in rows]) for name in names})


def _array(values: list[Any]) -> pa.Array:
    """One Arrow column; values of several types (1 beside "one") all become text."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values], pa.string())


def _delimited(delimiter: str) -> Callable[[Path], Part]:
    return lambda path: _csv(path, delimiter)


def _csv(path: Path, delimiter: str) -> Part:
    limit = csv.field_size_limit(2**30)  # the default refuses cells above 128 kB
    try:
        # strict: an unclosed quote is an error here, else it would swallow the rest of the file
        reader = csv.reader(_text_lines(path), delimiter=delimiter, strict=True)
        header, rows, places, line = None, [], [], 1
        try:
            for row in reader:
                start, line = line, reader.line_num + 1
                if not row:
                    continue
                if header is None:
                    header = _header(row, path, delimiter)
                elif len(row) != len(header):
                    raise UserError(
                        f"{path}, line {start}: {len(row)} cells where the header has {len(header)} "
                        f"({listed(header)}); last cell {row[-1][:40]!r}",
                        'put cells that hold the delimiter or a line break in "quotes", or complete the line',
                    )
                else:
                    rows.append(row)
                    places.append(start)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {line} (to {reader.line_num}): {error}",
                'check the quotes: a quote inside a quoted cell is written twice ("")',
            ) from None
    finally:
        csv.field_size_limit(limit)
    columns = zip(*rows, strict=True) if rows else ([] for _ in header or [])
    table = pa.table({n: pa.array(list(c), pa.string()) for n, c in zip(header or [], columns, strict=True)})
    return Part(str(path), table, "line", np.array(places, dtype=np.int64), path.parent)


def _header(row: list[str], path: Path, delimiter: str) -> list[str]:
    header = [name.strip() for name in row]
    twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}, line 1: column {twice[0]!r} stands twice in the header", "give it another name")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise UserError(
            f"{path}, line 1: the header {header[0]!r} has no {delimiter!r}",
            "separate the cells by commas (.csv) or tabs (.tsv)",
        )
    return header


def _parquet(path: Path) -> Part:
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise UserError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})", "write it anew"
        ) from None
    return Part(str(path), table, "row", np.arange(1, table.num_rows + 1), path.parent)


_READERS: dict[str, Callable[[Path], Part]] = {
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
}


# ---------------------------------------------------------------------------------------------- hub


def _hub(name: str, split: str) -> Part:
    match = _HUB_ID.match(name)
    if match is None or Path(name).suffix.lower() in _READERS:
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


def of_dataset(data: datasets.Dataset, name: str) -> Part:
    """A dataset in memory as a part; its features (class names, images) travel in the table's metadata."""
    table: Any = data.with_format("arrow")[:]
    table = table.replace_schema_metadata(data.features.arrow_schema.metadata)
    return Part(name, table, "row", np.arange(1, table.num_rows + 1))


def _beside(path: Path) -> str:
    try:
        return nearest(path.name, (p.name for p in path.expanduser().parent.iterdir()))
    except OSError:
        return f" (nor does the folder {path.parent})"


def _stack(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables under one another; columns that differ in type become text."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.concat_tables([_loose(table) for table in tables], promote_options="permissive")


def _loose(table: pa.Table) -> pa.Table:
    def cast(column: pa.ChunkedArray) -> pa.ChunkedArray:
        return column if pa.types.is_nested(column.type) else column.cast(pa.large_string())

    return pa.table({name: cast(table[name]) for name in table.column_names})


def many(sources: str | Iterable[str], split: Split) -> list[Part]:
    """The parts of one source or of several, in order."""
    return [part for source in ([sources] if isinstance(sources, str) else sources) for part in parts(source, split)]
