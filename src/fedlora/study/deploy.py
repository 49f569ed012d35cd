"""What clients would deploy, as models: the same that were scored, written as adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.adapters.algebra import sites
from fedlora.federation.algorithm import Request
from fedlora.federation.client import Job
from fedlora.federation.memory import quoted
from fedlora.federation.orders import Model, Score
from fedlora.federation.spec import Client
from fedlora.study import export
from fedlora.study.experiment import EVERYONE, Experiment

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


def write_adapters(
    experiment: Experiment, checkpoint: Mapping[str, Any], summary: Mapping[str, Any]
) -> dict[str, float | None]:
    """``adapters/global`` where a global model exists, and ``adapters/clients/ID`` for as many as the run file says.

    Returns each deployed model's score on everybody's test data, where the run file asks for it.
    """
    adapters = experiment.folder / "adapters"
    judge = experiment.algorithm.server_model(checkpoint["state"])
    if judge is not None:
        scores = summary["global"] or {}
        write(experiment, adapters / export.GLOBAL, judge, None, scores.get("score"))
    wanted = experiment.config.output.client_adapters
    named = {"all": len(experiment.judged), "none": 0, None: MOST}
    count = wanted if isinstance(wanted, int) else named[wanted]
    everyone = experiment.config.training.eval_everyone
    general: dict[str, float | None] = {}
    for position, client in enumerate(experiment.judged):
        if position >= count and not everyone:
            break
        model = next(iter(deployed(experiment, checkpoint, client).values()))
        if position < count:
            place = adapters / export.CLIENTS / quoted(client.id)
            write(experiment, place, model, client.id, summary["personal"]["per_client"].get(client.id))
        if everyone:
            general[client.id] = experiment.metric.of(
                experiment.fleet.alone([Job(Score(model, "test"), 0, EVERYONE)])[0]
            )
    return general


def _whole(model: Model) -> bool:
    """The shared base itself was trained, and no adapter is on it."""
    return any(name.startswith("backbone/") for name in model.params) and not sites(model.params)


def write(experiment: Experiment, folder: Any, model: Model, client: str | None, score: float | None) -> None:
    """One deployed model as a folder."""
    own = experiment.config.data.label_space == "client" and client is not None
    backbone = experiment.learner.backbones[model.backbone]
    own_model = model.backbone != "base" or _whole(model)
    counts = experiment.learner.facts(client)[1] if own and client is not None else {}
    about = export.About(
        export.settings(experiment.config),
        experiment.population.labels,
        experiment.config.algorithm.name,
        client,
        {} if score is None else {experiment.metric.name: score},
        () if own_model else export.recipe(backbone),
        tuple(label for label, count in counts.items() if count),
    )
    start = export.heads(experiment.spec, experiment.config.seed)
    export.save(folder, model, export.base_of(backbone), about, start, backbone if own_model else None)
