"""Code by name: gates and predictions are written as names with plain fields, and found again."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Mapping
from contextlib import suppress
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
    """The inverse of ``named``. A folder that somebody sent can name nothing else: only functions and frozen
    dataclasses that fedlora's algorithms define themselves, and algorithm files that were loaded before."""
    name = str(value["code"])
    module = name.partition(":")[0]
    if module == "fedlora.federation.orders" or module.startswith("fedlora.algorithms."):
        with suppress(ModuleNotFoundError):  # of another version
            importlib.import_module(module)
    elif not module.startswith("fedlora_user_") or module not in sys.modules:
        raise UserError(
            f"{place}: needs {name}, which is no algorithm of fedlora's", "predict from the run folder instead"
        )
    target, fields = _found(name), value.get("fields")
    if not (inspect.isfunction(target) if fields is None else _frozen(target)):
        raise UserError(f"{place}: needs {name}, which this version does not have", "install the version that wrote it")
    return target if fields is None else target(**{key: _value(item, place) for key, item in fields.items()})


def _value(item: Any, place: str | Path) -> Any:
    if isinstance(item, list):
        return tuple(_value(part, place) for part in item)
    return revived(item, place) if isinstance(item, Mapping) else item


def _frozen(target: Any) -> bool:
    params: Any = getattr(target, "__dataclass_params__", None) if isinstance(target, type) else None
    return params is not None and params.frozen


def _found(name: str) -> Any:
    """What a module defines under this name; not what it imports, and nothing within it."""
    module, _, path = name.partition(":")
    target = vars(sys.modules[module]).get(path) if module in sys.modules else None
    return target if getattr(target, "__module__", None) == module else None
