"""A site's own files as one client of a run: its columns, its label names, and the rank that its memory holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
from torch import nn

from fedlora.data.fields import as_dataset, columns_of, extract
from fedlora.data.formats import Part
from fedlora.data.keys import listed, nearest
from fedlora.data.population import Population, from_datasets
from fedlora.data.settings import DataSettings
from fedlora.data.sources import many
from fedlora.errors import UserError
from fedlora.learning.backbone import Backbone
from fedlora.sites.settings import SiteSettings
from fedlora.study.config import RunConfig
from fedlora.study.experiment import base_of

BASE = "base"
SPLITS = ("train", "validation", "test")
STATE = 16
"""Bytes of one trained number: its value, its gradient and two moments, all float32."""
KEPT = 2
"""Numbers that a backward pass keeps for each output of a linear layer."""
LIBRARIES = 600 * 2**20
"""Bytes of everything else: Python, torch, transformers, tokenised data. With a sentence encoder of 23 million
parameters the sum was within 5 % of the peak measured at 512, 1024 and 2048 tokens a pass and ranks 8 and 128."""


@dataclass(frozen=True)
class Brought:
    """What a site brings to a run: the run file as it carries it out, its examples, and its one client's ranks by layer
    and model."""

    config: RunConfig
    population: Population
    ranks: Mapping[str, Mapping[str, int]]
    models: Mapping[str, str]


def brought(site: SiteSettings, config: RunConfig, most: Mapping[str, int], labels: Sequence[str]) -> Brought:
    """A site's part in a run whose largest ranks by layer are ``most``. Raises UserError where it cannot take part."""
    config = localised(site, config)
    found = population(site, config, labels)
    ranks = dict(most)
    if site.resources.rank is not None or site.resources.memory is not None:
        backbone = base_of(config, labels) if site.resources.memory is not None else None
        rank = rank_of(site, config, backbone, max(most.values(), default=1))
        ranks = {layer: min(largest, rank) for layer, largest in most.items()}
    return Brought(config, found, {site.name: ranks}, {site.name: site.model.own or BASE})


def localised(site: SiteSettings, config: RunConfig) -> RunConfig:
    """The run file with what differs from site to site: where the base lies, the device, a model of its own."""
    if config.clients.models and site.model.own is None:
        raise UserError(
            f"site {site.name!r}: every site brings a model to this run", "name it in site.toml: [model] own = ..."
        )
    if site.model.own is not None and not config.clients.models:
        raise UserError(
            f"site {site.name!r}: [model] own = {site.model.own!r}, but the run's clients share one base",
            "leave it out for this run",
        )
    return config.replace(
        model={"name": site.model.base} if site.model.base else {},
        clients={"models": [site.model.own]} if site.model.own else {},
        engine={"device": site.resources.device},
    )


def population(site: SiteSettings, config: RunConfig, labels: Sequence[str]) -> Population:
    """The site's files as the one client ``site.name`` under the run's columns and label names.

    ``labels``: the run's label set (empty for causal-lm). Raises UserError where a file, a column, a label or the
    number of examples will not do; it names file, line and remedy.
    """
    rows = examples(site, config.model.task, labels)
    columns: dict[str, Any] = {name: name for name in rows.column_names if name != "split"}
    settings = DataSettings(
        **columns,
        labels=tuple(labels) or None,
        label_space=config.data.label_space,
        max_length=config.data.max_length,
        per_client=config.data.per_client,
        seed=config.data.seed,
    )
    found = from_datasets({site.name: rows}, settings, config.model.task, partial=True)
    count = len(found.train(site.name))
    if count < site.data.least:
        raise UserError(
            f"site {site.name!r} has {count} training examples, fewer than [data] least = {site.data.least}",
            "give it more data, or lower least if so few may train",
        )
    return found


def examples(site: SiteSettings, task: str, labels: Sequence[str]) -> datasets.Dataset:
    """Every example of the site under the run's names, with the column ``split`` where a file says so."""
    columns = columns_of(site.data.columns(), task)
    unused = set(site.data.labels) if "label" in columns else set[str]()
    require_targets(site, labels if "label" in columns else ())
    tables: list[pa.Table] = []
    splits: list[str] = []
    for split in SPLITS:
        for part in many(source, split) if (source := getattr(site.data, split)) else ():
            table = extract(part, columns)
            if "label" in columns:
                own = table["label"].to_pylist()
                unused -= set(own)
                place = table.column_names.index("label")
                table = table.set_column(place, "label", pa.array(renamed(own, part, site, labels), pa.large_string()))
            tables.append(table)
            splits += [split] * table.num_rows
    if unused:
        raise UserError(
            f"site {site.name!r}: [data.labels] maps {listed(sorted(unused))}, which no row has",
            "correct the name (as it is written in the file) or drop the line",
        )
    return as_dataset(tables).add_column("split", splits)  # type: ignore[call-arg]


def require_targets(site: SiteSettings, labels: Sequence[str]) -> None:
    """What label names are mapped to must be the run's."""
    for own, target in site.data.labels.items():
        if target not in labels:
            raise UserError(
                f"site {site.name!r}: [data.labels] {own!r} = {target!r}: the run has no label {target!r}"
                f"{nearest(target, labels)}",
                f"the run's labels are {listed(list(labels), 20)}",
            )


def renamed(own: Sequence[str], part: Part, site: SiteSettings, labels: Sequence[str]) -> list[str]:
    """The run's name of every row's label; an unknown one is an error that names it and its line."""
    names: Mapping[str, str] = {**{label: label for label in labels}, **site.data.labels}
    for row, label in enumerate(own):
        if label not in names:
            raise UserError(
                f"{part.place(row)}: label {label!r} is not one of the run's{nearest(label, labels)}",
                f"map it in site.toml: [data.labels] {label!r} = one of {listed(list(labels), 20)}",
            )
    return [names[label] for label in own]


def rank_of(site: SiteSettings, config: RunConfig, backbone: Backbone | None, most: int | None = None) -> int:
    """The rank that this site trains: ``[resources] rank``, what its ``memory`` holds, or the run's; at most ``most``
    (default: the run's ``[adapter] rank``). The base is needed where the rank follows from memory.

    Raises UserError where the memory holds not even rank 1.
    """
    most = config.adapter.rank if most is None else most
    if site.resources.rank is not None:
        return min(site.resources.rank, most)
    if site.resources.memory is None:
        return most
    assert backbone is not None
    fixed, each = needs(backbone, int(config.engine.tokens) if config.engine.tokens != "auto" else 1024)
    rank = (site.resources.memory - fixed) // each if each else most
    if rank < 1:
        raise UserError(
            f"site {site.name!r}: [resources] memory = {site.resources.memory:,} bytes; the base, one pass and rank 1 "
            f"need about {fixed + each:,}",
            "raise the limit, or lower [engine] tokens or take a smaller model in the run file",
        )
    return min(rank, most)


def needs(backbone: Backbone, tokens: int) -> tuple[int, int]:
    """(bytes whatever the rank, bytes for each rank), an estimate: libraries, base weights and what a pass over
    ``tokens`` keeps; for each rank the rows of A and columns of B with gradient and moments, and what a pass keeps."""
    weights = sum(p.numel() * p.element_size() for p in backbone.module.parameters())
    outputs = sum(m.out_features for m in backbone.module.modules() if isinstance(m, nn.Linear))
    head = 0 if backbone.head is None else STATE * sum(p.numel() for p in backbone.head.parameters())
    sizes = [(layer.out_features, layer.in_features) for layer in backbone.sites.values()]
    fixed = LIBRARIES + weights + KEPT * 4 * tokens * outputs + head
    return fixed, sum(STATE * (out + inner) + 4 * tokens for out, inner in sizes)
