"""The server's side of a run: the base, the algorithm and the sites; no data, no learner (``study.host.Host``)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedlora.engines.flower.fleet import GridFleet, Patience, Say
from fedlora.engines.flower.messages import Hello
from fedlora.errors import UserError
from fedlora.federation.admission import Limits
from fedlora.federation.algorithm import Algorithm
from fedlora.federation.orders import Model
from fedlora.federation.rounds import evaluate
from fedlora.federation.sampling import Cohorts
from fedlora.federation.spec import Client, ModelSpec, Sums
from fedlora.learning.backbone import Backbone
from fedlora.sites import agreement
from fedlora.study import algorithm as algorithms
from fedlora.study import folder as files
from fedlora.study import private
from fedlora.study.config import RunConfig
from fedlora.study.deploy import written
from fedlora.study.experiment import Terms, base_of, specified
from fedlora.study.summary import UNSEEN_PRIOR, Metric
from fedlora.study.tasks import task_of

PLAN, NODES = "federation.json", "nodes.json"
LIMITS = Limits()


@dataclass(frozen=True)
class Plan:
    """What a run folder says of its federation: the run's id, which client memories are filed under; the terms; the
    hash of the data where one machine divided it; how many sites there must be; what is to be known of that data."""

    run_id: str
    terms: Terms
    digest: str
    sites: int
    warnings: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        """Writes it."""
        files.write_json(folder / PLAN, {**vars(self), "terms": vars(self.terms)})

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Reads it."""
        found = json.loads((folder / PLAN).read_text())
        terms = found["terms"]
        lists = {name: tuple(terms[name]) for name in ("labels", "fields")}
        return cls(
            found["run_id"],
            Terms(**{**terms, **lists}),
            found["digest"],
            found["sites"],
            tuple(found.get("warnings", ())),
        )


class AtSites:
    """Adapters are written where the clients are."""

    def __call__(self, client: str, models: Mapping[str, Model], sums: Mapping[str, Sums]) -> None:
        raise NotImplementedError("a server is not told the models of clients")

    def on_everyone(self) -> dict[str, float | None]:
        """No server has everybody's test data."""
        return {}


@dataclass(frozen=True, eq=False)
class Federation:
    """A run whose clients are at sites."""

    config: RunConfig
    folder: Path
    plan: Plan
    algorithm: Algorithm[Any, Any, Any]
    backbone: Backbone
    spec: ModelSpec
    metric: Metric
    fleet: GridFleet
    limits: Limits | None = field(default=LIMITS)

    @property
    def run_id(self) -> str:
        """What client memories are filed under."""
        return self.plan.run_id

    @property
    def sampler(self) -> Cohorts:
        """Who takes part in a round."""
        return Cohorts(self.config.training.clients_per_round)

    @property
    def judged(self) -> tuple[Client, ...]:
        """All clients that sites have named, but the strangers."""
        known = sorted(self.fleet.clients.items())
        return tuple(client for name, client in known if name not in self.fleet.strangers)

    @property
    def strangers(self) -> tuple[Client, ...]:
        """Clients that never train."""
        return tuple(self.fleet.clients[name] for name in sorted(self.fleet.strangers))

    @property
    def labels(self) -> tuple[str, ...]:
        """The label space."""
        return self.plan.terms.labels

    @property
    def backbones(self) -> Mapping[str, Backbone]:
        """The base; models of the clients' own are at the sites."""
        return {"base": self.backbone}

    @property
    def shard(self) -> None:
        """None: sites are asked all at once."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a checkpoint belongs to."""
        return {"population": self.plan.digest, "ranks": dict(self.spec.ranks)}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was known of the data where one machine divided it."""
        return self.plan.warnings

    @property
    def class_prior(self) -> Mapping[str, Any] | None:
        """Not known here, and said to be so; None where there are no classes."""
        return UNSEEN_PRIOR if self.plan.terms.labels else None

    def spent(self) -> tuple[int, Mapping[str, float]]:
        """What the sites say that they have done."""
        return self.fleet.steps, dict(self.fleet.flops)

    def observed(self) -> Mapping[str, Any]:
        """For the round's line: what each site did."""
        return {"sites": self.fleet.observed()}

    def adapters(self) -> AtSites:
        """Sites write their own clients' adapters."""
        return AtSites()

    def evaluate(
        self, checkpoint: Mapping[str, Any], clients: Iterable[Client], deploy: AtSites | None = None
    ) -> dict[str, dict[str, Sums]]:
        """Sums on the sites' test data; with ``deploy`` the sites keep the deployed models."""
        clients = list(clients)
        self.fleet.write = written(self.config, clients) if deploy else frozenset()
        return dict(
            evaluate(
                self.algorithm,
                checkpoint,
                self.fleet,
                clients,
                total=self.config.training.rounds,
                run_id=self.run_id,
                splits=("test", "validation") if self.config.training.validate_rounds else ("test",),
            )
        )


def require_federable(config: RunConfig, algorithm: Algorithm[Any, Any, Any]) -> None:
    """Refuses what no server can do without the data."""
    private.require_suitable(config, algorithm)
    if not algorithm.federated:
        raise UserError(
            f"[algorithm] {config.algorithm.name} is no federation: it is a bound that sees all data",
            "run it with `fedlora run`",
        )
    if config.training.eval_everyone:
        raise UserError(
            "[training] eval_everyone: no participant of a federation has everybody's test data", "leave it out"
        )


def federation(
    config: RunConfig, folder: Path, grid: Grid, patience: Patience, say: Say = lambda event: None
) -> Federation:
    """The server's side of a run that has been planned in a folder."""
    plan = Plan.load(folder)
    algorithm = algorithms.build(config)
    require_federable(config, algorithm)
    backbone = base_of(config, plan.terms.labels)
    algorithm = algorithms.settled(algorithm, plan.terms.least)
    spec = specified(config, algorithm, backbone, plan.terms)
    task = task_of(config, plan.terms.labels, plan.terms.fields, backbone)
    facts = agreement.facts(backbone, task, spec, algorithm, config.seed)
    hello = Hello(plan.run_id, config, plan.terms, facts)
    limits = replace(LIMITS, message=config.engine.message)
    fleet = GridFleet(
        grid,
        hello,
        replace(patience, sites=plan.sites),
        say,
        limits=limits,
        nodes=registered_nodes(folder),
        unsuited=lambda clients: agreement.unsuited(algorithm, spec, config.seed, clients),
        again=again(folder),
    )
    return Federation(config, folder, plan, algorithm, backbone, spec, Metric(*task.metric), fleet)


def again(folder: Path) -> str:
    """The command that goes on with a federation's run: its sites are in its folder, or on other machines."""
    return f"fedlora resume {folder}" if (folder / "sites").is_dir() else "the same fedlora server start"


def registered_nodes(folder: Path) -> dict[int, str] | None:
    """Whose key each of Flower's nodes has, where the run's server registers keys; None: anybody's."""
    file = folder / NODES
    return {int(node): name for node, name in json.loads(file.read_text()).items()} if file.exists() else None
