"""What a server settles before a run from its run file alone, for it sees no data; and what may change on the way."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.data.fields import columns_of
from fedlora.engines.flower.host import Plan, require_federable
from fedlora.errors import UserError
from fedlora.sites import agreement
from fedlora.study import algorithm as algorithms
from fedlora.study import folder as files
from fedlora.study.config import RunConfig, dumps, load
from fedlora.study.experiment import Terms, base_of, specified

PATIENCE = ("deadline", "quorum", "join", "message")
"""Keys of ``[engine]`` that change how long the server waits and what it lets in, but nothing of what is computed."""
SHOWN = 8
"""Differences that are named: another algorithm brings other defaults of everything."""


def planned(config: RunConfig, folder: Path, sites: int) -> None:
    """Settles what a server can settle without data, and writes it down."""
    config, terms = resolved(config)
    (folder / "config.toml").write_text(dumps(config))
    Plan(uuid.uuid4().hex, terms, "", sites).save(folder)


def resolved(config: RunConfig) -> tuple[RunConfig, Terms]:
    """The run file with every open choice settled, and the terms of all."""
    algorithm = algorithms.build(config)
    require_federable(config, algorithm)
    labels = config.data.labels or ()
    if config.model.task != "causal-lm" and not labels:
        raise UserError(
            "[data] labels is missing: this server sees no data", 'list the label set: labels = ["benign", "malign"]'
        )
    ranks = agreement.ranks_of(config)
    backbone = base_of(config, labels)
    terms = agreement.served(config, backbone, labels, tuple(columns_of(config.data, config.model.task)))
    algorithm = algorithms.settled(algorithm, terms.least)
    config = algorithms.stated(config, algorithm)
    spec = specified(config, algorithm, backbone, terms)
    if reason := agreement.unsuited(algorithm, spec, config.seed, ()):
        raise UserError(reason)
    dtype, engine = config.model.dtype, config.engine
    config = config.replace(
        model={"dtype": "float32" if dtype == "auto" else dtype},
        adapter={"alpha": spec.alpha},
        clients={"ranks": ranks},
        engine={
            "lanes": 1 if engine.lanes == "auto" else engine.lanes,
            "tokens": 1024 if engine.tokens == "auto" else engine.tokens,
        },
    )
    return config, terms


def require_same(config: RunConfig, folder: Path, sites: int) -> None:
    """A run goes on as it began: it may last longer, and wait otherwise and for another number of sites. Every other
    difference is an error that names it; silence would let its owner believe in what is not so."""
    begun = load(folder / "config.toml")
    wanted, _ = resolved(config)
    if changed := list(differences(begun, wanted)):
        more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise UserError(
            f"{folder}: the run began with other settings: {'; '.join(changed[:SHOWN])}{more}",
            "use those it began with (see its config.toml), or give --out another folder for another run",
        )
    rounds = max(config.training.rounds, begun.training.rounds)
    patience = {key: getattr(config.engine, key) for key in PATIENCE}
    files.replace(folder / "config.toml", dumps(begun.replace(training={"rounds": rounds}, engine=patience)))
    replace(Plan.load(folder), sites=sites).save(folder)


def differences(begun: RunConfig, wanted: RunConfig) -> Iterator[str]:
    """ "KEY = VALUE (now VALUE)" for each key that may not change while a run goes on and has."""
    before, after = (dict(entries(config.model_dump(by_alias=True, mode="json"))) for config in (begun, wanted))
    free = {"training.rounds", *(f"engine.{key}" for key in PATIENCE)}
    for key in sorted({*before, *after} - free):
        if before.get(key) != after.get(key):
            yield f"{key} = {_shown(before.get(key))} (now {_shown(after.get(key))})"


def entries(table: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables by dotted key, without what is unset.

    >>> dict(entries({"seed": 0, "adapter": {"rank": 8, "alpha": None, "extras": {}}}))
    {'seed': 0, 'adapter.rank': 8}
    """
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from entries(value, f"{place}{key}.")
        elif value is not None:
            yield f"{place}{key}", value


def _shown(value: Any) -> str:
    return "unset" if value is None else repr(value)
