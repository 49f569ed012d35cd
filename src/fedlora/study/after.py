"""What one does with a finished run: score it on other data, serve a client that comes late."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from fedlora.data.fields import examples
from fedlora.errors import UserError
from fedlora.federation import checkpoint as checkpoints
from fedlora.federation.client import Job
from fedlora.federation.memory import quoted
from fedlora.federation.orders import Model, Score
from fedlora.federation.spec import Sums
from fedlora.study import export, folder
from fedlora.study.config import RunConfig, load
from fedlora.study.deploy import deployed, newcomers, write_own
from fedlora.study.experiment import Experiment, assemble, gradients


def evaluate(
    run: str | Path,
    data: str | Path,
    *,
    client: str | None = None,
    model: Any = None,
    models: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """The scores of a run's global model (or of one client's deployed model) on a file with the run's columns.

    Raises UserError where there is no such model, or where the file holds labels that the run (where label spaces are
    own: the client) does not know.
    """
    place, config, saved = _finished(run)
    found, about = export.load(export.deployed(place, client), models)
    table = examples(str(data), config.data, config.model.task)
    if foreign := set(table["label"]) - set(about.own_labels) if about.own_labels else ():
        raise UserError(
            f"{data}: label {min(foreign)!r} is none of client {client!r}'s own ({', '.join(about.own_labels)})",
            'leave its rows out: where [data] label_space is "client", a client\'s model knows no other labels',
        )
    table = table.add_column("split", ["test"] * len(table))  # type: ignore[arg-type]
    config = config.replace(data={"per_client": None})  # that is of the run's clients: all rows given are scored
    experiment = _alone(config, place, "data", table, saved["ranks"], model, models)
    experiment.learner.knows("data", about.own_labels or about.labels)
    return _scores(experiment, found, "data")


@gradients()
def personalize(
    run: str | Path,
    data: str | Path,
    *,
    client: str = "new-client",
    backbone: str | None = None,
    model: Any = None,
    models: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, float]]:
    """Introduces a new client to a finished run and writes what it would deploy: (its adapter's folder, test scores).

    Its examples are split 70/10/20 like any client's; the server's state stays as it is. ``backbone``: which of
    ``[clients] models`` is its own (default: the first). A newcomer of an earlier round, before ``resume``, is written
    anew. Raises UserError where the run has such a client, or the data will not do.
    """
    if not client.strip():
        raise UserError(f"--client {client!r}: a client needs a name", "give it an id that no other client has")
    place, config, saved = _finished(run)
    target = place / "adapters" / export.CLIENTS / quoted(client)
    if client in saved["acked"] or (target.exists() and newcomers(place).get(client) in (None, saved["round"])):
        raise UserError(f"{place}: a client {client!r} is there already", "choose another --client id")
    table = examples(str(data), config.data, config.model.task)
    known, wanted = config.clients.models or [], backbone
    if backbone is not None:
        backbone = next((name for name in (backbone, os.path.abspath(backbone)) if name in known), None)
    if wanted is not None and backbone is None:
        raise UserError(f"--model {wanted}: not one of the run's [clients] models", f"choose {', '.join(known)}")
    experiment = _alone(config, place, client, table, saved["ranks"], model, models, backbone)
    best = next(iter(deployed(experiment, saved, experiment.fleet.clients[client]).values()))
    scores = _scores(experiment, best, client)
    write_own(experiment, target, best, client, scores.get(experiment.metric.name), int(saved["round"]))
    return target, scores


def _finished(run: str | Path) -> tuple[Path, RunConfig, Mapping[str, Any]]:
    """A run's folder, its resolved configuration and its last checkpoint."""
    place = folder.existing(run)
    saved = checkpoints.latest(place / "checkpoints")
    if saved is None:
        raise UserError(f"{place}: the run has no checkpoint yet", f"finish it: fedlora resume {place}")
    return place, load(place / "config.toml"), saved


def _alone(
    config: RunConfig,
    place: Path,
    client: str,
    table: datasets.Dataset,
    ranks: Mapping[str, int],
    model: Any,
    models: Mapping[str, Any] | None,
    backbone: str | None = None,
) -> Experiment:
    """The run's model and algorithm with one other client, which holds the largest rank served and never trains."""
    names = {name: name for name in ("text", "label", "prompt", "response", "image") if getattr(config.data, name)}
    config = config.replace(data=names)
    given = {client: table}
    return assemble(config, place, model=model, clients=given, models=models, largest=ranks, backbone_of=backbone)


def _scores(experiment: Experiment, model: Model, client: str) -> dict[str, float]:
    sums: Sums = experiment.fleet.alone([Job(Score(model, "test"), 0, client)])[0]
    return {name: total / count for name, (total, count) in sums.items() if count}
