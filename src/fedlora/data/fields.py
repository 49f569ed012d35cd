"""Which columns a task reads, and turning them into the project's own columns, checked row by row."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute

from fedlora.data.formats import Part
from fedlora.data.keys import listed, nearest
from fedlora.data.settings import DataSettings
from fedlora.data.sources import Split, dataset, parts
from fedlora.errors import UserError

TASKS = ("text-classification", "image-classification", "causal-lm")
pc: Any = pyarrow.compute  # its functions are made at import, where no type checker sees them
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def columns_of(settings: DataSettings, task: str) -> dict[str, str]:
    """Our column name -> the user's, for one task. Raises `UserError` where a key is missing or out of place.

    >>> columns_of(DataSettings(text="review", label="stars"), "text-classification")
    {'text': 'review', 'label': 'stars'}
    """
    if task not in TASKS:
        raise UserError(f"model.task {task!r} is unknown{nearest(task, TASKS)}", f"use one of {', '.join(TASKS)}")
    named = {key: getattr(settings, key) for key in ("text", "image", "prompt", "response", "label")}
    given = {key: column for key, column in named.items() if column is not None}
    if task == "causal-lm":
        if set(given) not in ({"text"}, {"prompt", "response"}):
            raise UserError(
                f"task causal-lm needs data.prompt and data.response, or data.text alone; given: {sorted(given)}",
                "name the columns, for example prompt = 'question', response = 'answer'",
            )
        return given
    source = "text" if task == "text-classification" else "image"
    surplus = set(given) - {source, "label"}
    if surplus:
        raise UserError(f"task {task} does not read data.{min(surplus)}", f"it reads data.{source} and data.label")
    return {source: given.get(source, source), "label": given.get("label", "label")}


def extract(part: Part, columns: Mapping[str, str]) -> pa.Table:
    """The wanted columns of a part under our names: text as large strings, images as {bytes, path}.

    Raises `UserError` naming the file, line and column of the first empty value, and missing columns with the nearest.
    """
    known = part.table.column_names
    for ours, theirs in columns.items():
        if theirs not in known:
            example = f"{ours} = {(known or ['...'])[0]!r}"
            if ours == "client":  # no key of its own
                example = f"partition = {{column = {(known or ['...'])[0]!r}}}"
            raise UserError(
                f"{part.name} has no column {theirs!r} (wanted as {ours}); it has {listed(known)}"
                f"{nearest(theirs, known)}",
                f"name the right column in [data], for example {example}",
            )
    features = datasets.Features.from_arrow_schema(part.table.schema)
    taken = {}
    for ours, theirs in columns.items():
        column = part.table[theirs]
        if ours == "image":
            taken[ours] = _images(part, theirs, column)
        else:
            taken[ours] = _texts(part, theirs, column, features[theirs], trim=ours in ("label", "client"))
    return pa.table(taken)


def examples(source: str, settings: DataSettings, task: str, split: Split = "test") -> datasets.Dataset:
    """The checked examples of one more source (to evaluate on, say), under the columns' names that `settings` give."""
    columns = columns_of(settings, task)
    return as_dataset([extract(part, columns) for part in parts(source, split)])


def as_dataset(tables: Sequence[pa.Table]) -> datasets.Dataset:
    """One in-memory dataset of the stacked tables; an image column decodes on access."""
    table = pa.concat_tables(tables)
    features = {
        name: datasets.Image() if name == "image" else datasets.Value("large_string") for name in table.column_names
    }
    return dataset(table.cast(datasets.Features(features).arrow_schema))


def _texts(part: Part, name: str, column: pa.ChunkedArray, feature: object, trim: bool) -> pa.ChunkedArray:
    if isinstance(feature, datasets.ClassLabel):
        column = _class_names(column, feature)
    kind = column.type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise UserError(f"{part.name}: column {name!r} holds {kind}, not text", "turn its values into text first")
    if pa.types.is_floating(kind):
        column = _numbers(part, name, column)
    texts = column.cast(pa.large_string())
    blank = pc.utf8_trim_whitespace(texts)
    bad = pc.fill_null(pc.equal(blank, ""), True)
    count = pc.sum(bad).as_py() or 0
    if count:
        row = pc.index(bad, True).as_py()
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise UserError(f"{part.place(row)}: column {name!r} is empty{more}", "fill it in or remove the line")
    return blank if trim else texts


def _numbers(part: Part, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Floats as they are written in text: whole where all are (some file had a gap), null where there is no number."""
    column = column.cast(pa.float32()) if pa.types.is_float16(column.type) else column  # Arrow writes no halves
    if (row := pc.index(pc.is_inf(column), True).as_py()) >= 0:
        raise UserError(f"{part.place(row)}: column {name!r} is infinite", "correct the number or remove the line")
    column = pc.if_else(pc.is_nan(column), None, column)
    whole = pc.and_(pc.equal(pc.round(column), column), pc.less(pc.abs(column), 2.0**53))
    return column.cast(pa.int64()) if pc.all(whole).as_py() else column


def _class_names(column: pa.ChunkedArray, feature: datasets.ClassLabel) -> pa.ChunkedArray:
    names = pa.array(feature.names, pa.large_string())
    known = pc.if_else(pc.greater_equal(column, 0), column, None)  # -1 stands for "no label" in hub datasets
    return pa.chunked_array([names.take(chunk) for chunk in known.chunks], pa.large_string())


def _images(part: Part, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    data: list[bytes | None] = [None] * len(column)
    paths: list[str | None] = [None] * len(column)
    if pa.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}:
        raw = [value or {} for value in column.to_pylist()]
        data, paths = [value.get("bytes") for value in raw], [value.get("path") for value in raw]
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        data = column.to_pylist()
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        paths = column.to_pylist()
    else:
        raise UserError(f"{part.name}: column {name!r} holds {kind}, not images", "give encoded bytes or file paths")
    paths = [path if content else _found(part, name, row, path) for row, (content, path) in enumerate(zip(data, paths))]
    chunks = []
    for start in range(0, len(data), 10_000):  # short chunks: one Arrow binary array holds at most 2 GB
        rows = zip(data[start : start + 10_000], paths[start : start + 10_000], strict=True)
        chunks.append(pa.array([{"bytes": content or None, "path": path} for content, path in rows], _IMAGE))
    return pa.chunked_array(chunks, _IMAGE)


def _found(part: Part, name: str, row: int, path: str | None) -> str:
    """An image file's path: from its data file's folder, or as written."""
    if not path:
        raise UserError(f"{part.place(row)}: column {name!r} is empty", "fill it in or remove the line")
    for candidate in (path if part.folder is None else str(part.folder / path), path):
        if os.path.isfile(candidate):
            return candidate
    raise UserError(f"{part.place(row)}: image {path!r} does not exist", "correct the path")
