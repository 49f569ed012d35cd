"""``fedlora site check``: everything that can go wrong at a site, tried before it matters."""

from __future__ import annotations

import datetime
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from fedlora.errors import UserError
from fedlora.federation.client import Job
from fedlora.federation.orders import Fit, Model, Tuned
from fedlora.sites import agreement, keys
from fedlora.sites.data import brought, examples
from fedlora.sites.guard import permitted, with_own_algorithm
from fedlora.sites.settings import SiteSettings, load
from fedlora.study import algorithm as algorithms
from fedlora.study.config import RunConfig
from fedlora.study.experiment import Experiment, assemble

RENEW = "fedlora server init --renew --host NAME"
SOON = 30
"""Days before its end that a certificate is said to expire."""
PATIENCE = 5.0


@dataclass(frozen=True)
class Line:
    """One check: ``ok`` is None where it could not be made."""

    name: str
    ok: bool | None
    said: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = {True: "pass", False: "FAIL", None: "----"}[self.ok]
        return f"{mark}  {self.name}: {self.said}" + (f"\n      -> {self.remedy}" if self.remedy else "")


def check(folder: Path, config: RunConfig | None = None) -> Iterator[Line]:
    """A line for each check, as it is made. ``config``: the run file that the site is to take part in; without it
    neither labels nor model nor training can be tried."""
    try:
        site = load(folder)
    except UserError as error:
        yield failed("site.toml", error)
        return
    yield Line("site.toml", True, f"site {site.name!r}, server {site.server.address}")
    yield from _key(site)
    yield _attempt("data", lambda: _data(site, config))
    if config is None:
        yield Line("model and training", None, "not tried", "name the run file: fedlora site check --run RUN.toml")
    else:
        yield _attempt("limits", lambda: _limits(site, config))
        yield from _training(site, config)
    yield from _server(site)


def failed(name: str, error: Exception) -> Line:
    """A line of what an error says."""
    said, _, remedy = str(error).partition("\n  -> ")
    return Line(name, False, said or type(error).__name__, remedy or "see the message")


def _attempt(name: str, what: Callable[[], str]) -> Line:
    try:
        return Line(name, True, what())
    except (UserError, OSError, RuntimeError, ValueError) as error:
        return failed(name, error)


def _key(site: SiteSettings) -> Iterator[Line]:
    if site.server.insecure:
        yield Line("key", None, "insecure = true: this site proves nothing of itself", "remove insecure outside trials")
    elif problem := keys.private_problem(Path(site.server.key)):
        yield Line("key", False, problem, "make a key with `fedlora site init`, or set its permissions")
    else:
        yield Line("key", True, "readable by its owner alone")


def _data(site: SiteSettings, config: RunConfig | None) -> str:
    """Counts only: no line of this may show data."""
    if config is not None:
        labels = config.data.labels or ()
        known = brought(_without_memory(site), config, {"": config.adapter.rank}, labels).population
        counts = {name: len(rows) for name, rows in known.clients[site.name].items()}
        return f"{sum(counts.values())} examples: " + ", ".join(f"{count} {name}" for name, count in counts.items())
    task = "causal-lm" if site.data.label is None else "image-classification" if site.data.image else TEXT
    own = sorted(set(site.data.labels.values())) if task != "causal-lm" else []
    try:
        return f"{len(examples(site, task, own))} examples"
    except UserError as error:
        if "is not one of the run's" in str(error):
            return "readable; its label names are checked with --run RUN.toml"
        raise


def _limits(site: SiteSettings, config: RunConfig) -> str:
    """What the site's owner allows, against the run file."""
    config = with_own_algorithm(site.allow, config)
    if reason := permitted(site.allow, config, algorithms.build(config)):
        raise UserError(reason, "change [allow] in site.toml, if you want this run")
    return f"{PurePath(config.algorithm.name).name} for {config.training.rounds} rounds is allowed"


TEXT = "text-classification"


def _without_memory(site: SiteSettings) -> SiteSettings:
    return site.model_copy(update={"resources": site.resources.model_copy(update={"memory": None})})


def _training(site: SiteSettings, config: RunConfig) -> Iterator[Line]:
    """The model, and one local step."""
    with tempfile.TemporaryDirectory() as place:
        try:
            experiment = _experiment(site, config, Path(place))
        except (UserError, OSError, RuntimeError, ValueError) as error:
            yield failed("model", error)
            return
        rank = max(experiment.fleet.clients[site.name].ranks.values(), default=0)
        clients = [experiment.fleet.clients[site.name]]
        if reason := agreement.unsuited(experiment.algorithm, experiment.spec, config.seed, clients):
            yield failed("model", UserError(reason))
            return
        parameters = sum(p.numel() for p in experiment.backbone.module.parameters())
        device = experiment.backbone.device
        yield Line("model", True, f"{parameters:,} parameters on {device}, rank {rank}")
        yield _attempt("one local step", lambda: _step(experiment, site.name))


def _experiment(site: SiteSettings, config: RunConfig, folder: Path) -> Experiment:
    """The site alone in a run, with its own rank, on the terms that the run's server will state."""
    from fedlora.sites.data import localised, rank_of
    from fedlora.study.experiment import base_of

    labels = config.data.labels or ()
    local = localised(site, config)
    backbone = base_of(local, labels)
    terms = agreement.served(config, backbone, labels, ())
    resources = {"rank": rank_of(site, local, backbone, max(terms.most.values(), default=1)), "memory": None}
    site = site.model_copy(update={"resources": site.resources.model_copy(update=resources)})  # what memory gave
    own = brought(site, config, terms.most, labels)
    terms = replace(terms, fields=own.population.fields, ranks=own.ranks, models=own.models)
    return assemble(own.config, folder, population=own.population, terms=terms)


def _step(experiment: Experiment, client: str) -> str:
    """One optimiser step on the site's own examples."""
    spec, learner = experiment.spec, experiment.learner
    whose = experiment.fleet.clients[client]
    params: Mapping[str, Any] = {**spec.adapter(whose.ranks, 0), **spec.start(0)}
    if whose.backbone != "base":
        params = {name: value for name, value in params.items() if name.startswith("head/")}
    trained = tuple(dict.fromkeys(name.split("/")[0] if name.startswith("head/") else "B" for name in params))
    order = Fit(Model(params, backbone=whose.backbone), trained, steps=1, batch_size=8)
    ticket = learner.submit(Job(order, 0, client))
    while not learner.idle:
        for done, result in learner.advance():
            if done == ticket and isinstance(result, Tuned):
                total, count = result.sums["train_loss"]
                return f"loss {total / count:.4f}"
            if done == ticket:
                raise RuntimeError(f"{type(result).__name__}: {result}")
    raise RuntimeError("the step gave no result")


def _server(site: SiteSettings) -> Iterator[Line]:
    """Reachable, and who it says it is."""
    host, _, port = site.server.address.rpartition(":")
    host = host.strip("[]")
    try:
        connection = socket.create_connection((host, int(port)), PATIENCE)
    except OSError as error:
        remedy = "check the address, and that this machine may dial out to it: see docs/federation.md"
        yield Line("server", False, f"{site.server.address}: {error.strerror or error}", remedy)
        return
    with connection:
        yield Line("server", True, f"{site.server.address} answers")
        if site.server.insecure:
            yield Line("certificate", None, "insecure = true: none is asked for", "remove insecure outside trials")
        else:
            yield _certificate(connection, host, Path(site.server.ca))


def _certificate(connection: socket.socket, host: str, ca: Path) -> Line:
    try:
        keys.read_certificate(ca)
        context = ssl.create_default_context(cafile=str(ca))
        with context.wrap_socket(connection, server_hostname=host) as secure:
            told: Any = secure.getpeercert() or {}
    except UserError as error:
        return failed("certificate", error)
    except ssl.SSLCertVerificationError as error:
        return Line("certificate", False, error.verify_message, _remedy(error.verify_message))
    except (ssl.SSLError, OSError) as error:
        return Line("certificate", False, f"no TLS: {error}", "start the server without --insecure")
    end = datetime.datetime.fromtimestamp(ssl.cert_time_to_seconds(told["notAfter"]), datetime.UTC)
    left = (end - datetime.datetime.now(datetime.UTC)).days
    remedy = f"renew it on the server: {RENEW}" if left < SOON else ""
    return Line("certificate", True, f"valid for {host}, {left} days left", remedy)


def _remedy(message: str) -> str:
    if "expired" in message:
        return f"on the server: {RENEW}, then start it again; check this machine's clock"
    if "mismatch" in message or "not valid for" in message:
        return f"on the server: {RENEW}, with the name that this site dials"
    return "copy ca.pem from the server's folder anew, by a way that you trust"
