"""What a run file may say, for ``fedlora run --help``: every table, its keys, and what the sections say of them."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedlora.study.config import RunConfig


def reference(width: int = 100) -> str:
    """All keys by table, with their defaults (none: unset, or the algorithm's own)."""
    tables = [f"Keys of a run file, and their defaults:\n\n  seed = {RunConfig.model_fields['seed'].default}"]
    for name, model in _tables(RunConfig, ""):
        keys = ", ".join(_key(key, field) for key, field in model.model_fields.items() if not _nested(field))
        about = " ".join((inspect.getdoc(model) or "").partition(">>>")[0].replace("`", "").split())
        about = about.removeprefix(f"[{name}]").lstrip(".: ")
        parts = (f"  [{name}]", *(textwrap.indent(textwrap.fill(part, width - 4), "    ") for part in (keys, about)))
        tables.append("\n".join(parts))
    return "\n\n".join(tables)


def _tables(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for key, field in model.model_fields.items():
        if (inner := _nested(field)) is not None:
            yield f"{prefix}{key}", inner
            yield from _tables(inner, f"{prefix}{key}.")


def _nested(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _key(name: str, field: FieldInfo) -> str:
    unset = field.is_required() or field.default in (None, ())
    return field.alias or name if unset else f"{field.alias or name} = {json.dumps(field.default)}"
