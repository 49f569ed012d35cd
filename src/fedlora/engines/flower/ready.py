"""What a site brings to a run, from its folder: its share of a divided data set, or its own files (``site.toml``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from fedlora.engines.flower import split
from fedlora.engines.flower.messages import Hello, Presence
from fedlora.engines.simulator import Simulator
from fedlora.errors import UserError
from fedlora.federation.memory import quoted
from fedlora.federation.orders import Model
from fedlora.federation.spec import Sums
from fedlora.sites import agreement, guard, settings
from fedlora.sites.data import Brought, brought
from fedlora.sites.settings import Allowed
from fedlora.study import algorithm as algorithms
from fedlora.study import export
from fedlora.study.deploy import write_own
from fedlora.study.experiment import Experiment, assemble

log = logging.getLogger(__name__)
SETTINGS, RUNS = "site.toml", "runs"
Deploy = Callable[[str, Mapping[str, Model], Mapping[str, Sums]], None]


class Work(Protocol):
    """What a site needs of a learner beside its being an executor."""

    def forget(self) -> None:
        """Drops every job."""
        ...


@dataclass(frozen=True, eq=False)
class Ready:
    """A run at a site. ``spent``: steps so far and operations by client; ``writer``: keeps the deployed models of some
    clients; ``allow``: what the site's owner allows (None: everything)."""

    presence: Presence
    fleet: Simulator
    learner: Work
    spent: Callable[[], tuple[int, Mapping[str, float]]]
    writer: Callable[[set[str]], Deploy]
    allow: Allowed | None = field(default=None)


def site_name(folder: Path) -> str:
    """The site's name: as its ``site.toml`` says, or the folder's."""
    file = folder / SETTINGS
    return settings.load(file).name if file.exists() else folder.name


def ready(folder: Path, hello: Hello) -> Ready:
    """Loads what a run needs. Raises UserError where the site cannot or may not take part."""
    file = folder / SETTINGS
    terms, allow = hello.terms, None
    if file.exists():
        site = settings.load(file)
        allow = site.allow
        config = guard.with_own_algorithm(allow, hello.config)
        if reason := guard.permitted(allow, config, algorithms.build(config)):
            raise UserError(reason)
        own = brought(site, config, terms.most, terms.labels)
    else:
        share = split.share(folder, terms.labels)
        own = Brought(hello.config, share.population, share.ranks, share.models)
    terms = replace(terms, ranks=own.ranks, models=own.models)
    experiment = assemble(own.config, folder, population=own.population, terms=terms)
    facts = agreement.facts_of(experiment)
    if hello.facts and (found := agreement.differences(hello.facts, facts)):
        raise UserError("; ".join(found))
    clients = tuple(client for _, client in sorted(experiment.fleet.clients.items()))
    if reason := agreement.unsuited(experiment.algorithm, experiment.spec, experiment.config.seed, clients):
        raise UserError(reason)
    presence = Presence(site_name(folder), clients, experiment.fleet.strangers, facts)
    learner = experiment.learner
    place = experiment.folder / "adapters"
    places = [place / export.CLIENTS]
    if file.exists():  # such a site serves one run after the other
        places.append(place / RUNS / quoted(hello.run_id))

    def deploys(names: set[str]) -> Deploy:
        return writer(experiment, names, places)

    return Ready(presence, experiment.fleet, learner, experiment.spent, deploys, allow)


def writer(experiment: Experiment, names: set[str], places: Sequence[Path]) -> Deploy:
    """Keeps the deployed models of some clients as adapter folders: where the latest lies, which the next run replaces,
    and where this run's stays. No one else has it, so that a copy is cheaper than its loss."""

    def deploy(client: str, models: Mapping[str, Model], sums: Mapping[str, Sums]) -> None:
        if client in names:
            deployed, model = next(iter(models.items()))
            for place in places:
                write_own(experiment, place / quoted(client), model, client, experiment.metric.of(sums[deployed]))

    return deploy
