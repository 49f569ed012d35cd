"""What clients would deploy, as models: the same that were scored, written as adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.adapters.algebra import sites
from fedlora.federation.algorithm import Request
from fedlora.federation.client import Job
from fedlora.federation.memory import quoted
from fedlora.federation.orders import Model, Score
from fedlora.federation.spec import Client, Sums
from fedlora.study import export
from fedlora.study.config import RunConfig
from fedlora.study.experiment import EVERYONE, Experiment
from fedlora.study.host import Host, Writes

MOST = 100
"""Clients' adapters that are written where the run file does not say."""


def deployed(experiment: Experiment, checkpoint: Mapping[str, Any], client: Client) -> dict[str, Model]:
    """A client's models by variant, the deployed one first: what an evaluation of this checkpoint scores.

    The program draws from the streams of that evaluation, so training at the end (local fine-tuning) repeats exactly.
    """
    algorithm, round = experiment.algorithm, int(checkpoint["round"])
    payload = algorithm.broadcast(checkpoint["state"], client, round)
    acked = checkpoint["acked"].get(client.id)
    total = experiment.config.training.rounds
    request = Request(experiment.run_id, "evaluate", round, total, acked, None, payload)
    return experiment.fleet.models(client.id, request)


def written(config: RunConfig, clients: Sequence[Client]) -> frozenset[str]:
    """The clients whose adapters are written: the first ones, as many as the run file says."""
    wanted = config.output.client_adapters
    named = {"all": len(clients), "none": 0, None: MOST}
    return frozenset(client.id for client in clients[: wanted if isinstance(wanted, int) else named[wanted]])


@dataclass(eq=False)
class Adapters:
    """Writes ``adapters/clients/ID`` while the clients are scored, for as many as the run file says; holds on to the
    deployed models where they are to be scored on everybody's data as well."""

    experiment: Experiment
    models: dict[str, Model] = field(default_factory=dict[str, Model])

    @cached_property
    def written(self) -> frozenset[str]:
        """The clients whose adapters are written."""
        return written(self.experiment.config, self.experiment.judged)

    def __call__(self, client: str, models: Mapping[str, Model], sums: Mapping[str, Sums]) -> None:
        deployed, model = next(iter(models.items()))
        if client in self.written:
            place = self.experiment.folder / "adapters" / export.CLIENTS / quoted(client)
            write_own(self.experiment, place, model, client, self.experiment.metric.of(sums[deployed]))
        if self.experiment.config.training.eval_everyone:
            self.models[client] = model

    def on_everyone(self) -> dict[str, float | None]:
        """Each deployed model's score on everybody's test data."""
        names = sorted(self.models)
        jobs = [Job(Score(self.models[name], "test"), 0, EVERYONE) for name in names]
        found = self.experiment.fleet.alone(jobs) if jobs else ()
        return {name: self.experiment.metric.of(sums) for name, sums in zip(names, found, strict=True)}


def newcomers(run: Path) -> dict[str, int]:
    """The clients that came to a run after its end, and the round that each one's model is of."""
    found = [json.loads(file.read_text()) for file in run.glob(f"adapters/{export.CLIENTS}/*/{export.ABOUT}")]
    return {about["client"]: about["round"] for about in found if about.get("round") is not None}


def write_global(experiment: Host, checkpoint: Mapping[str, Any], score: float | None) -> None:
    """``adapters/global``, where a global model exists."""
    judge = experiment.algorithm.server_model(checkpoint["state"])
    if judge is not None:
        write(experiment, experiment.folder / "adapters" / export.GLOBAL, judge, None, score)


def _whole(model: Model) -> bool:
    """The shared base itself was trained, and no adapter is on it."""
    return any(name.startswith("backbone/") for name in model.params) and not sites(model.params)


def write_own(
    experiment: Experiment, folder: Any, model: Model, client: str, score: float | None, round: int | None = None
) -> None:
    """One client's deployed model as a folder. ``round``: see ``export.About``."""
    mask = experiment.learner.label_mask(client)  # the labels that its scores know, and no others, are predicted
    own = () if mask is None else tuple(np.asarray(experiment.labels)[mask.numpy()].tolist())
    write(experiment, folder, model, client, score, own, round)


def write(
    experiment: Writes,
    folder: Any,
    model: Model,
    client: str | None,
    score: float | None,
    own_labels: tuple[str, ...] = (),
    round: int | None = None,
) -> None:
    """One deployed model as a folder. ``own_labels``: the client's, where label spaces are own."""
    backbone = experiment.backbones[model.backbone]
    own_model = model.backbone != "base" or _whole(model)
    about = export.About(
        export.settings(experiment.config),
        experiment.labels,
        experiment.config.algorithm.name,
        client,
        {} if score is None else {experiment.metric.name: score},
        () if own_model else export.recipe(backbone),
        own_labels,
        round,
    )
    start = export.heads(experiment.spec, experiment.config.seed)
    export.save(folder, model, export.base_of(backbone), about, start, backbone if own_model else None)
