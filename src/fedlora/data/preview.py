"""What `fedlora data FILE.toml` shows before a run."""

from __future__ import annotations

from collections import Counter

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedlora.data.population import Population
from fedlora.data.split import FIT, NAMES, TEST


def describe(population: Population, clients: int = 20, labels: int = 15) -> RenderableType:
    """Clients with their counts, the labels, and every warning, as one rich renderable.

    clients, labels: how many rows each table shows at most; the rest is counted.
    """
    parts: list[RenderableType] = [_headline(population), _clients(population, clients)]
    if population.labels:
        parts.append(_labels(population, labels))
    parts += [Text(f"warning: {warning}", style="yellow") for warning in population.warnings]
    return Group(*parts)


def _headline(population: Population) -> Text:
    counts = population.clients.counts()
    total = counts.sum(axis=0)
    seen = len(population.clients) - len(population.unseen)
    size = counts.sum(axis=1)
    held = f" and {len(population.unseen)} that never train" if population.unseen else ""
    return Text(
        f"{seen:,} training clients{held}, {int(total.sum()):,} examples: "
        + ", ".join(f"{int(count):,} {name}" for name, count in zip(NAMES, total, strict=True))
        + f"\nexamples per client: {size.min():,} to {size.max():,}, median {np.median(size):,.0f}"
        + f"\nfields: {', '.join(population.fields)}    digest: {population.digest[:12]}"
    )


def _clients(population: Population, limit: int) -> Table:
    table = Table("client", *NAMES, *(["labels", "most frequent"] if population.labels else []), title="Clients")
    for column in table.columns[1 : 1 + len(NAMES)]:
        column.justify = "right"
    unseen = set(population.unseen)
    label = _label_column(population)
    for name, count in list(zip(population.clients, population.clients.counts(), strict=True))[:limit]:
        cells = [escape(name) + (" [dim](never trains)[/dim]" if name in unseen else ""), *map(str, count)]
        if label is not None:
            rows = population.train(name)
            most = Counter(label[row] for row in rows).most_common(3)
            cells += [
                str(len({label[row] for row in rows})),
                escape(", ".join(f"{value} {100 * n // max(len(rows), 1)} %" for value, n in most)),
            ]
        table.add_row(*cells)
    if len(population.clients) > limit:
        table.caption = f"and {len(population.clients) - limit:,} more clients"
    return table


def _labels(population: Population, limit: int) -> Table:
    label = _label_column(population)
    assert label is not None
    roles = np.full(len(population.table), -1)
    for client in population.clients.values():
        for role, name in enumerate(NAMES):
            roles[client[name]] = role
    train = Counter(value for value, role in zip(label, roles, strict=True) if role >= FIT and role != TEST)
    test = Counter(value for value, role in zip(label, roles, strict=True) if role == TEST)
    table = Table("label", "train", "test", "", title=f"{len(population.labels)} labels")
    table.columns[1].justify = table.columns[2].justify = "right"
    most = max(train.values(), default=1)
    for value in sorted(population.labels, key=lambda name: -train[name])[:limit]:
        table.add_row(escape(value), str(train[value]), str(test[value]), "█" * round(24 * train[value] / most))
    if len(population.labels) > limit:
        table.caption = f"and {len(population.labels) - limit} rarer labels"
    return table


def _label_column(population: Population) -> list[str] | None:
    return population.table["label"][:] if population.labels else None
