"""A run from start to end: rounds, scores, checkpoints, and the folder that holds them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import Interrupted, UserError, refused
from fedlora.federation import checkpoint as checkpoints
from fedlora.federation.rounds import Report, rounds
from fedlora.federation.spec import Client, stream
from fedlora.study import folder as files
from fedlora.study.config import RunConfig, dumps, load, parse
from fedlora.study.deploy import newcomers, write_global
from fedlora.study.experiment import Experiment, assemble, gradients
from fedlora.study.host import Adapters, Host
from fedlora.study.progress import Progress
from fedlora.study.summary import spread, summarise

log = logging.getLogger(__name__)

Engine = Callable[[Experiment, Mapping[str, Any]], AbstractContextManager[Host]]
"""Who holds an experiment's clients while it runs; also told what was given as objects instead of by name."""


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its ``summary.json`` and the lines of its ``metrics.jsonl``."""

    folder: Path
    summary: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]


def run(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    model: Any = None,
    clients: Mapping[str, Any] | None = None,
    models: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    name: str = "run",
    progress: bool = False,
    **overrides: Mapping[str, Any],
) -> Result:
    """Trains a federation and writes its run folder.

    ``config`` is a run file, nested plain values or a RunConfig; ``overrides`` replace keys of sections
    (``training={"rounds": 3}``). ``model`` (a transformers model) and ``clients`` ({id: datasets.Dataset}) may be given
    as objects instead of by name, also ``models``: torch modules under the names that ``[clients] models`` uses (with
    their tokenizer as ``module.processor``, else the base's).

    Raises UserError for what the user can put right, Interrupted on Ctrl-C (the run can be resumed).
    """
    if not isinstance(config, RunConfig):
        config = load(config) if isinstance(config, str | Path) else parse(config, "config")
    if overrides:
        config = config.replace(**overrides)
    folder = files.fresh(out or config.output.dir, f"{name}-{files.safe(config.algorithm.name)}")
    with files.owned(folder), ExitStack() as stack:
        try:
            host = stack.enter_context(hosted(config, folder, model=model, clients=clients, models=models))
        except BaseException:
            files.discard_empty(folder)
            raise
        return proceed(host, progress)


def resume(
    folder: str | Path,
    *,
    rounds: int | None = None,
    model: Any = None,
    clients: Mapping[str, Any] | None = None,
    models: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Result:
    """Goes on with an interrupted run, bit for bit as if it had not stopped; ``rounds`` is a new total.

    Raises UserError where the folder holds no run, or another process has it, or its data has changed; Interrupted on
    Ctrl-C.
    """
    place = files.existing(folder)
    with files.owned(place):
        config = load(place / "config.toml")
        if rounds is not None:
            config = config.replace(training={"rounds": rounds})
        with hosted(config, place, model=model, clients=clients, models=models) as host:
            return proceed(host, progress)


def on_ray() -> Engine:
    """The engine on Ray; UserError where Ray is not installed."""
    try:
        from fedlora.engines.ray.host import hosted as start
    except ModuleNotFoundError as problem:
        if problem.name != "ray":
            raise
        raise UserError('[engine] name = "ray": Ray is not installed', "pip install fedlora[ray]") from None
    return start


def here() -> Engine:
    """The engine that is this process."""
    return lambda experiment, given: nullcontext(experiment)


ENGINES: Mapping[str, Callable[[], Engine]] = {"simulator": here, "ray": on_ray}


@contextmanager
def hosted(config: RunConfig, folder: Path, **given: Any) -> Iterator[Host]:
    """A run on the engine that it names, ready to start; ``given``: objects instead of names."""
    engine = ENGINES[config.engine.name]()  # before anything is loaded
    with gradients(), engine(assemble(config, folder, **given), given) as host:
        yield host


def proceed(experiment: Host, progress: bool = False) -> Result:
    """Goes on from the folder's last checkpoint, or begins."""
    place, total = experiment.folder, experiment.config.training.rounds
    saved = checkpoints.latest(place / "checkpoints")
    if saved is not None and int(saved["round"]) > total:
        raise UserError(
            f"{place}: the run is at round {saved['round']}, beyond --rounds {total}", "give a larger total"
        )
    if saved is not None and saved["population"] != experiment.identity["population"]:
        raise UserError(
            f"{place}: the data or its split has changed since the run began (its hash differs)",
            "restore the files named in config.toml, or start a new run",
        )
    files.replace(place / "config.toml", dumps(experiment.config))
    files.forget_after(place, -1 if saved is None else int(saved["round"]))
    return _train(experiment, saved, progress)


def _train(experiment: Host, saved: Mapping[str, Any] | None, progress: bool) -> Result:
    """The loop around ``rounds``: score, write the line, checkpoint, tell the loop that it is durable."""
    config, folder = experiment.config, experiment.folder
    training = config.training
    with Progress(training.rounds, progress) as watched, _resumable(folder, config.algorithm.name):
        for warning in experiment.warnings:
            log.warning("%s", warning)
            watched.warn(warning)
        reports = rounds(
            experiment.algorithm,
            experiment.spec,
            watched.over(experiment.fleet),
            total=training.rounds,
            seed=config.seed,
            run_id=experiment.run_id,
            sampler=experiment.sampler,
            resume=saved,
            limits=experiment.limits,
            shard=experiment.shard,
        )
        checkpoint = saved
        for report, cost in _timed(reports, experiment):
            scores = _scores(experiment, report.checkpoint) if _due(report.round, config) else {}
            line = {**_line(report, cost, scores), **experiment.observed()}
            files.append(folder / "metrics.jsonl", line)
            watched.done(line)
            checkpoint = {**report.checkpoint, **experiment.identity}
            experiment.fleet.flush()
            checkpoints.save(folder / "checkpoints", checkpoint)
            report.saved()
        assert checkpoint is not None  # round 0 is always reported
        watched.say("scoring, writing adapters")
        adapters = experiment.adapters()
        summary = _summary(experiment, checkpoint, adapters)
        write_global(experiment, checkpoint, (summary["global"] or {}).get("score"))
        if general := adapters.on_everyone():
            summary["personal"]["on_everyone"] = spread(general, experiment.metric)
        files.write_json(folder / "summary.json", summary)
        for name, round in newcomers(folder).items():
            if round != summary["rounds"]:
                text = f"the adapter of {name!r}, who came at round {round}, is not of this one: personalize it anew"
                log.warning("%s", text)
                watched.warn(text)
    return Result(folder, summary, tuple(files.lines(folder / "metrics.jsonl")))


@contextmanager
def _resumable(folder: Path, algorithm: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; go on with: fedlora resume {folder}") from None
    except Exception as error:
        if (problem := refused(error)) is None:
            if ".py:" in algorithm:  # what it asked for is done elsewhere: the traceback may not show its file
                error.add_note(f"[algorithm] name = {algorithm!r} was running")
            raise
        remedy = f"make room or give the right, then go on with: fedlora resume {folder}"
        raise UserError(f"{folder}: the run stopped: {problem}", remedy) from error


@dataclass(frozen=True)
class Cost:
    """What a round took: seconds, client-steps, and floating-point operations by client."""

    seconds: float
    steps: int
    flops: Mapping[str, float]


def _timed(reports: Iterator[Report], experiment: Host) -> Iterator[tuple[Report, Cost]]:
    """Each report with what its round took."""
    while True:
        start, (steps, flops) = time.perf_counter(), experiment.spent()
        report = next(reports, None)
        if report is None:
            return
        seconds, (then, counts) = time.perf_counter() - start, experiment.spent()
        spent = {name: count - flops.get(name, 0.0) for name, count in counts.items()}
        yield report, Cost(seconds, then - steps, {n: f for n, f in spent.items() if f})


def _due(round: int, config: RunConfig) -> bool:
    """Whether a round is scored on the way; the end of a run always is."""
    every = config.training.eval_every
    return every > 0 and round % every == 0 and round < config.training.rounds


def _scores(experiment: Host, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of a sample of clients, on the way."""
    clients = list(experiment.judged)
    count = experiment.config.training.eval_clients
    if count is not None and count < len(clients):
        order = stream(experiment.config.seed, "eval", checkpoint["round"])
        clients = [clients[i] for i in sorted(_permutation(len(clients), order)[:count])]
    summary = _scored(experiment, checkpoint, clients)
    personal, overall = summary["personal"], summary["global"]
    return {
        "personal": {key: personal[key] for key in ("mean", "std", "worst_decile", "variants")},
        "global": None if overall is None else overall["score"],
        **({"validation": summary["validation"]} if "validation" in summary else {}),
    }


def _scored(
    experiment: Host, checkpoint: Mapping[str, Any], clients: Iterable[Client], adapters: Adapters | None = None
) -> dict[str, Any]:
    single = experiment.algorithm.server_model(checkpoint["state"]) is not None
    return summarise(experiment.evaluate(checkpoint, clients, adapters), experiment.metric, single)


def _permutation(count: int, generator: Any) -> list[int]:
    import torch

    return torch.randperm(count, generator=generator).tolist()


def _line(report: Report, cost: Cost, scores: Mapping[str, Any]) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    total, count = report.sums.get("train_loss", (0.0, 0.0))
    names = sorted({*report.clients, *cost.flops})
    return {
        "round": report.round,
        "loss": total / count if count else None,
        **scores,
        "participants": len(report.folded),
        "lost": list(report.lost),
        "rejected": dict(report.rejected),
        "bytes": dict(report.bytes),
        "flops": sum(cost.flops.values()),
        "seconds": cost.seconds,
        "client_steps": cost.steps,
        "client_steps_per_second": cost.steps / cost.seconds if cost.steps else 0.0,
        "clients": {name: {**report.clients.get(name, {}), "flops": cost.flops.get(name, 0.0)} for name in names},
        **({"measures": dict(report.measures)} if report.measures else {}),
    }


def _summary(experiment: Host, checkpoint: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """summary.json: final scores of everybody, and totals over the lines of metrics.jsonl."""
    lines = list(files.lines(experiment.folder / "metrics.jsonl"))
    seconds = sum(line["seconds"] for line in lines)
    steps = sum(line["client_steps"] for line in lines)
    scores = _scored(experiment, checkpoint, experiment.judged, adapters)
    prior = experiment.class_prior
    totals = {key: sum(line["bytes"][key] for line in lines) for key in ("up", "down", "setup_up", "setup_down")}
    return {
        "algorithm": experiment.config.algorithm.name,
        "federated": experiment.algorithm.federated,
        "rounds": int(checkpoint["round"]),
        "clients": len(experiment.judged),
        "metric": experiment.metric.name,
        "higher_is_better": experiment.metric.higher_is_better,
        **scores,
        **({"class_prior": prior} if prior else {}),
        "warnings": list(experiment.warnings),
        "unseen": _unseen(experiment, checkpoint),
        "bytes": totals,
        "flops": sum(line.get("flops", 0.0) for line in lines),
        "seconds": seconds,
        "client_steps_per_second": steps / seconds if seconds else 0.0,
        "versions": files.versions(),
        "data_hash": experiment.identity["population"],
        "seed": experiment.config.seed,
        "model": experiment.config.model.name,
    }


def _unseen(experiment: Host, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Clients outside training: the server's model as it is, and what a newcomer would deploy."""
    strangers: tuple[Client, ...] = experiment.strangers
    if not strangers:
        return None
    scores = _scored(experiment, checkpoint, strangers)
    return {"clients": len(strangers), "zero-shot": scores["global"], "few-shot": scores["personal"]}
