"""From ``[algorithm]``, ``[training]`` and ``[adapter.extras]`` to an algorithm value."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from rich.table import Table

from fedlora.algorithms import ALGORITHMS
from fedlora.data.keys import meant
from fedlora.errors import UserError
from fedlora.federation.algorithm import Algorithm
from fedlora.federation.orders import Optimizer, Training
from fedlora.federation.spec import Extras
from fedlora.study.config import RunConfig, TrainingSettings


def build(config: RunConfig) -> Algorithm[Any, Any, Any]:
    """The configured algorithm; own parameters are checked against the class's fields and types.

    Its ``training`` and ``extras`` start from the class's defaults (the paper's) and take what the run file states.
    Where every client has labels of its own, heads stay at home unless it says otherwise: averaged, a label's row would
    be diluted by all who never see it.
    """
    cls = find(config.algorithm.name)
    if missing := [name for name in REQUIRED if getattr(cls, name) is getattr(Algorithm, name)]:
        raise UserError(
            f"[algorithm] name = {config.algorithm.name!r}: it lacks {', '.join(missing)}",
            "see docs/writing-an-algorithm.md",
        )
    fields = {field.name for field in dataclasses.fields(cls)}
    parameters = config.algorithm.parameters
    for name in parameters:
        if name in ("training", "extras") or name not in fields:
            own = fields - {"training", "extras"}
            hint = meant(name, own) if own else "it has none of its own"
            raise UserError(f"[algorithm] {name}: {config.algorithm.name} has no such parameter ({hint})")
    values = {name: _typed(cls, name, value) for name, value in parameters.items()}
    if "training" in fields:
        values["training"] = overlaid(cls(**values).training, config.training)
    if "extras" in fields:
        stated = config.adapter.extras.model_dump(exclude_none=True)
        own = {"head": "private"} if config.data.label_space == "client" else {}
        values["extras"] = dataclasses.replace(cls(**values).extras, **{**own, **stated})
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"[algorithm] {config.algorithm.name}: {error}") from None


REQUIRED = ("aggregator", "server_init", "broadcast", "client_update", "expects", "server_update", "personalize")
"""What an algorithm cannot do without."""


def find(name: str) -> Any:
    """The class of a table name or of "file.py:Class"."""
    if ".py:" not in name:
        if name not in ALGORITHMS:
            raise UserError(f"[algorithm] name = {name!r}: no such algorithm ({meant(name, ALGORITHMS)})")
        return ALGORITHMS[name]
    path, _, wanted = name.rpartition(":")
    file = Path(path)
    if not file.exists():
        raise UserError(f"[algorithm] name = {name!r}: no file {file}", "give the path relative to the run file")
    module_name = "fedlora_user_" + hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    cls = getattr(module, wanted, None)
    if not (isinstance(cls, type) and issubclass(cls, Algorithm) and dataclasses.is_dataclass(cls)):
        found = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module_name]
        raise UserError(
            f"[algorithm] name = {name!r}: {wanted} is no dataclass that subclasses fedlora's Algorithm",
            f"classes in {file.name}: {', '.join(found) or 'none'}",
        )
    return cls


def overlaid(training: Training, stated: TrainingSettings) -> Training:
    """An algorithm's default local training with what the run file states on top."""
    optimizer = training.optimizer
    simple = {"name": stated.optimizer} | {
        key: getattr(stated, key) for key in ("lr", "momentum", "weight_decay", "clip")
    }
    optimizer = dataclasses.replace(optimizer, **{k: v for k, v in simple.items() if v is not None})
    if stated.head_lr not in (None, head_lr(optimizer)):  # what it has already stays as it is written
        others = tuple(pair for pair in optimizer.lrs if pair[0] != "head")
        optimizer = dataclasses.replace(optimizer, lrs=(*others, ("head", stated.head_lr)))
    length: dict[str, Any] = {}
    if stated.steps is not None:
        length = {"epochs": None, "steps": stated.steps}
    elif stated.epochs is not None:
        length = {"epochs": stated.epochs, "steps": None}
    rest = {key: getattr(stated, key) for key in ("batch_size", "schedule") if getattr(stated, key) is not None}
    return dataclasses.replace(training, optimizer=optimizer, **length, **rest)


def head_lr(optimizer: Optimizer) -> float:
    """The rate of heads.

    >>> head_lr(Optimizer(lr=0.1)), head_lr(Optimizer(lr=0.1, lrs=(("head", 0.2),)))
    (0.1, 0.2)
    """
    return dict(optimizer.lrs).get("head", optimizer.lr)


def settled(algorithm: Algorithm[Any, Any, Any], smallest: int) -> Algorithm[Any, Any, Any]:
    """With what follows from the clients filled in: a bucket has the smallest client's rank."""
    if getattr(algorithm, "merge", None) == "bucket" and getattr(algorithm, "bucket_rank", 0) is None:
        return dataclasses.replace(algorithm, bucket_rank=smallest)  # type: ignore[type-var]
    return algorithm


def stated(config: RunConfig, algorithm: Algorithm[Any, Any, Any]) -> RunConfig:
    """The configuration with every default of the algorithm written out."""
    training: Training | None = getattr(algorithm, "training", None)
    sections: dict[str, dict[str, Any]] = {}
    if training is not None:
        optimizer = training.optimizer
        sections["training"] = {
            "epochs": training.epochs,
            "steps": training.steps,
            "batch_size": training.batch_size,
            "schedule": training.schedule,
            "optimizer": optimizer.name,
            "lr": optimizer.lr,
            "head_lr": head_lr(optimizer),
            "momentum": optimizer.momentum,
            "weight_decay": optimizer.weight_decay,
            "clip": optimizer.clip,
        }
    extras: Extras | None = getattr(algorithm, "extras", None)
    if extras is not None:
        sections["adapter"] = {"extras": dataclasses.asdict(extras)}
    return config.replace(**sections)


def _typed(cls: Any, name: str, value: Any) -> Any:
    hint = get_type_hints(cls, include_extras=True)[name]
    if value == NONE and type(None) in get_args(hint):
        return None
    try:
        return TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else _LAX).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"[algorithm] {name} = {value!r}: {problem['msg']}") from None


NONE = "none"
"""How a run file switches an optional parameter off: TOML has no word for it."""

_LAX = ConfigDict(arbitrary_types_allowed=True)


def catalogue() -> Table:
    """The table of names: what each algorithm is, and its own parameters with their defaults."""
    table = Table(title="[algorithm] name = ...", title_justify="left")
    for heading in ("name", "what", "parameters (defaults)"):
        table.add_column(heading, overflow="fold")
    for name in ALGORITHMS:
        cls = find(name)
        value = cls()
        own = [f.name for f in dataclasses.fields(cls) if f.name not in ("training", "extras")]
        what = (cls.__doc__ or "").strip().splitlines()[0]
        table.add_row(name, what, ", ".join(f"{field} = {getattr(value, field)!r}" for field in own))
    return table
