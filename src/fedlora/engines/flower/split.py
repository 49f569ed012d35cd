"""One machine's data divided among sites, as if each had always had its own: what ``fedlora federate`` begins with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from fedlora.data.population import Clients, Population
from fedlora.errors import UserError
from fedlora.study import folder as files
from fedlora.study.experiment import Experiment, Terms

FOLDER, ABOUT = "data", "clients.json"


@dataclass(frozen=True)
class Share:
    """What a site was given: its population, and each client's ranks by layer and backbone."""

    population: Population
    ranks: Mapping[str, Mapping[str, int]]
    models: Mapping[str, str]


def site_names(count: int) -> list[str]:
    """Names that sort as they are numbered.

    >>> site_names(3)
    ['site-1', 'site-2', 'site-3']
    """
    return [f"site-{number:0{len(str(count))}d}" for number in range(1, count + 1)]


def divided(experiment: Experiment, terms: Terms, sites: int) -> list[Path]:
    """Writes every site's examples and clients into ``sites/NAME/``; the clients go round the sites in order.

    Raises UserError where there are more sites than clients, or none.
    """
    population = experiment.population
    names = list(population.clients)
    if not 1 <= sites <= len(population.seen):
        raise UserError(
            f"--sites {sites}: the data has {len(population.seen)} clients that train",
            "give from 1 to as many sites, or more clients in [data] partition",
        )
    seen = {name: i % sites for i, name in enumerate(population.seen)}
    strangers = {name: i % sites for i, name in enumerate(population.unseen)}
    places = {**seen, **strangers}
    folders: list[Path] = []
    for number, site in enumerate(site_names(sites)):
        own = [name for name in names if places[name] == number]
        folder = experiment.folder / "sites" / site
        _write(folder, population, own, {n: terms.ranks[n] for n in own}, {n: terms.models[n] for n in own})
        folders.append(folder)
    return folders


def _write(
    folder: Path,
    population: Population,
    own: list[str],
    ranks: Mapping[str, Mapping[str, int]],
    models: Mapping[str, str],
) -> None:
    rows: list[np.ndarray] = []
    owner: list[np.ndarray] = []
    role: list[np.ndarray] = []
    for number, name in enumerate(own):
        for part, found in enumerate(population.clients[name].values()):
            rows.append(found)
            owner.append(np.full(len(found), number))
            role.append(np.full(len(found), part))
    order = np.argsort(np.concatenate(rows), kind="stable")  # a client's examples in the table's order, as before
    folder.mkdir(parents=True, exist_ok=True)
    table = population.table.select(np.concatenate(rows)[order])
    with silent():
        table.save_to_disk(str(folder / FOLDER))
    about = {
        "clients": own,
        "strangers": [name for name in own if name in set(population.unseen)],
        "owner": np.concatenate(owner)[order].tolist(),
        "role": np.concatenate(role)[order].tolist(),
        "ranks": {name: dict(table) for name, table in ranks.items()},
        "models": dict(models),
        "digest": population.digest,
    }
    files.replace(folder / ABOUT, json.dumps(about))  # last: a site whose file is there is complete


@contextmanager
def silent() -> Iterator[None]:
    """No bars of the datasets library."""
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()


def share(folder: Path, labels: tuple[str, ...]) -> Share:
    """Reads what ``divided`` wrote; the label space is the federation's."""
    about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
    table = datasets.Dataset.load_from_disk(str(folder / FOLDER))
    clients = Clients(about["clients"], np.asarray(about["owner"]), np.asarray(about["role"]))
    population = Population(table, clients, tuple(about["strangers"]), labels, (), about["digest"])
    return Share(population, about["ranks"], about["models"])
