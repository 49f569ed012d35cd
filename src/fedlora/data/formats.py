"""File formats: JSON, CSV and Parquet as Arrow tables that know the line or row of every value."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedlora.data.keys import listed
from fedlora.errors import UserError

CHUNK = 2_000
"""Rows that become an Arrow table: it holds text in a third of the memory that Python's objects take."""
_DECODER = json.JSONDecoder(parse_constant={"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}.__getitem__)


@dataclass(frozen=True)
class Part:
    """One file (or hub split) as read: its columns, and where each row stood."""

    name: str
    table: pa.Table
    unit: Literal["line", "row"]
    places: np.ndarray  # (rows,) int64: the line or row number, from 1
    folder: Path | None = None  # what relative image paths start from
    unread: tuple[Path, ...] = ()  # what lies beside it in a folder that was given, and is not read with it

    def place(self, row: int) -> str:
        """'reviews.csv, line 7' for row index 5 of a file with a header."""
        return f"{self.name}, {self.unit} {int(self.places[row])}"


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
        rows.append(_object(_parsed(line, path, number), path, "line", number))
        places.append(number)
        if len(rows) == CHUNK:
            tables.append(_columns(rows, path, "line", places[-CHUNK:]))
            rows = []
    tables += [_columns(rows, path, "line", places[-len(rows) :])] if rows or not tables else []
    return Part(str(path), stack(tables), "line", np.array(places, dtype=np.int64), path.parent)


def _json_array(path: Path) -> Part:
    values = _parsed("".join(_text_lines(path)), path)
    rows = [_object(value, path, "row", number) for number, value in enumerate(values, 1)]
    places = np.arange(1, len(rows) + 1)
    return Part(str(path), _columns(rows, path, "row", places), "row", places, path.parent)


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a line, or of a whole file (None), in which NaN, which is no JSON, stands for no value."""
    if line is None:
        shown, remedy = "", "the file must be one array of objects, or one object a line"
    else:
        shown = f": {text.strip()[:60]!r}"
        remedy = "every line must be one complete JSON object; repair or remove this one"
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        raise UserError(f"{path}, {place}: not JSON ({error.msg}){shown}", remedy) from None
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # a whole number of more digits than Python takes from text
        reason = str(error).split(";")[0]
    raise UserError(f"{path}{'' if line is None else f', line {line}'}: cannot be read ({reason}){shown}", remedy)


def _object(value: Any, path: Path, unit: str, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{path}, {unit} {number}: {str(value)[:40]!r} is not an object", 'write {"text": "...", "label": "..."}'
        )
    return value


def _columns(rows: Sequence[dict[str, Any]], path: Path, unit: str, places: Sequence[int] | np.ndarray) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return pa.table({name: _array([row.get(name) for row in rows]) for name in names})
    except UnicodeEncodeError:
        place, name, value = next(
            (place, name, value)
            for place, row in zip(places, rows, strict=True)
            for name, value in row.items()
            if not _encodes(f"{name}{json.dumps(value, ensure_ascii=False)}")
        )
    raise UserError(
        f"{path}, {unit} {place}: column {name!r} holds half a character (\\ud800 to \\udfff): {str(value)[:60]!r}",
        "write the whole character, or remove the half",
    )


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


READERS: dict[str, Callable[[Path], Part]] = {
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
}


def checked(clients: Any) -> Mapping[str, datasets.Dataset]:
    """What a program gave as its clients' datasets, by id; UserError where it is anything else."""
    remedy = "pass clients = {'name': dataset, ...}"
    if not isinstance(clients, Mapping):
        raise UserError(f"clients: a {type(clients).__name__} was given, no mapping", remedy)
    given: Mapping[Any, Any] = clients
    if not given:
        raise UserError("no clients were given", remedy)
    for name, data in given.items():
        if not isinstance(name, str):
            raise UserError(f"clients: the id {name!r} is of type {type(name).__name__}", "ids are text: str(id)")
        if not isinstance(data, datasets.Dataset):
            raise UserError(
                f"client {name!r} is given as a {type(data).__name__}, not as a datasets.Dataset",
                "make one: Dataset.from_pandas(frame), Dataset.from_list(rows); of several splits: one of them",
            )
    return given


def of_dataset(data: datasets.Dataset, name: str) -> Part:
    """A dataset in memory as a part; its features (class names, images) travel in the table's metadata."""
    table: Any = data.with_format("arrow")[:]
    table = table.replace_schema_metadata(data.features.arrow_schema.metadata)
    return Part(name, table, "row", np.arange(1, table.num_rows + 1))


def stack(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables under one another; columns that differ in type become text."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.concat_tables([_loose(table) for table in tables], promote_options="permissive")


def _loose(table: pa.Table) -> pa.Table:
    def cast(column: pa.ChunkedArray) -> pa.ChunkedArray:
        return column if pa.types.is_nested(column.type) else column.cast(pa.large_string())

    return pa.table({name: cast(table[name]) for name in table.column_names})
