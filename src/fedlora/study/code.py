"""Code by name: gates and predictions are written as names with plain fields, and found again."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.errors import UserError


def named(code: Any) -> dict[str, Any]:
    """A module-level function, or a frozen dataclass with plain fields, as a JSON value.

    >>> from fedlora.federation.orders import logits
    >>> named(logits)
    {'code': 'fedlora.federation.orders:logits'}
    """
    is_value = dataclasses.is_dataclass(code) and not isinstance(code, type)
    target: Any = type(code) if is_value else code
    name = f"{target.__module__}:{target.__qualname__}"
    if _found(name) is not target:
        raise UserError(f"{name} cannot be exported: it is not defined at a module's top level", "move it there")
    if not is_value:
        return {"code": name}
    return {"code": name, "fields": {f.name: _field(getattr(code, f.name), name) for f in dataclasses.fields(code)}}


def _field(value: Any, place: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_field(item, place) for item in value]
    if callable(value) or dataclasses.is_dataclass(value):
        return named(value)
    raise UserError(
        f"{place} cannot be exported: a field holds a {type(value).__name__}", "keep arrays in params, as extra/..."
    )


def revived(value: Mapping[str, Any], place: str | Path) -> Any:
    """The inverse of ``named``. Only fedlora's own code and algorithm files loaded before are run: a folder that
    somebody sent cannot name anything else."""
    name = str(value["code"])
    module = name.partition(":")[0]
    if module.partition(".")[0] == "fedlora":
        importlib.import_module(module)
    elif not module.startswith("fedlora_user_") or module not in sys.modules:
        raise UserError(f"{place}: needs {name}, which is not part of fedlora", "predict from the run folder instead")
    target = _found(name)
    if target is None:
        raise UserError(f"{place}: needs {name}, which this version does not have", "install the version that wrote it")
    if "fields" not in value:
        return target
    return target(**{key: _value(item, place) for key, item in value["fields"].items()})


def _value(item: Any, place: str | Path) -> Any:
    if isinstance(item, list):
        return tuple(_value(part, place) for part in item)
    return revived(item, place) if isinstance(item, Mapping) else item


def _found(name: str) -> Any:
    module, _, path = name.partition(":")
    target: Any = sys.modules.get(module)
    for part in path.split("."):
        target = getattr(target, part, None)
    return target
