"""``fedlora federate``: a whole federation on one machine, each part in a process of its own, over the loopback."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.engines.flower.host import PLAN, Plan, again, require_federable
from fedlora.engines.flower.processes import SiteProcesses, SuperLink, stoppable
from fedlora.engines.flower.server_app import STATUS
from fedlora.engines.flower.split import divided
from fedlora.engines.flower.watch import Watch
from fedlora.errors import UserError
from fedlora.sites import agreement
from fedlora.study import algorithm as algorithms
from fedlora.study import folder as files
from fedlora.study.config import RunConfig, dumps, load
from fedlora.study.experiment import assemble, terms_of
from fedlora.study.run import Result

FLOWER = "flower"
RESTARTS = 3
"""How often in a row the server is started again without a round between."""
LOOK = 0.3


def federate(
    config: RunConfig, sites: int = 3, *, out: str | Path | None = None, name: str = "run", progress: bool = False
) -> Result:
    """Trains a federation of so many sites on this machine and writes its run folder.

    The clients are those of ``fedlora run`` with the same run file, and so are the results: with ``lanes = 1``, on one
    machine and thread count, bit for bit. Site i serves every ``sites``-th client.

    Raises UserError for what the user can put right, Interrupted on Ctrl-C (the run can be resumed).
    """
    require_federable(config, algorithms.build(config))
    folder = files.fresh(out or config.output.dir, f"{name}-{files.safe(config.algorithm.name)}")
    with files.owned(folder):
        try:
            plan(config, folder, sites)
        except BaseException:
            files.discard_empty(folder)
            raise
    return operate(folder, progress)


def plan(config: RunConfig, folder: Path, sites: int) -> None:
    """Settles what is open in the run file, divides the data, and writes down what a server needs."""
    experiment = assemble(config, folder)
    terms = terms_of(experiment.config, experiment.population, experiment.backbone)
    clients = [client for _, client in sorted(experiment.fleet.clients.items())]
    if reason := agreement.unsuited(experiment.algorithm, experiment.spec, config.seed, clients):
        raise UserError(reason)  # here, where nobody waits for sites that may not come
    divided(experiment, terms, sites)
    (folder / "config.toml").write_text(dumps(experiment.config))
    Plan(uuid.uuid4().hex, terms, experiment.population.digest, sites, experiment.warnings).save(folder)


def resume(folder: str | Path, *, rounds: int | None = None, progress: bool = False) -> Result:
    """Goes on with a federated run of this machine; ``rounds`` is a new total."""
    place = files.existing(folder)
    if not (place / "sites").is_dir():
        raise UserError(f"{place}: its sites are on other machines", "go on with: fedlora server start")
    if rounds is not None:
        config = load(place / "config.toml").replace(training={"rounds": rounds})
        files.replace(place / "config.toml", dumps(config))
    return operate(place, progress)


def is_federated(folder: str | Path) -> bool:
    """Whether a run folder is a federation's."""
    return (Path(folder) / PLAN).exists()


def operate(folder: Path, progress: bool) -> Result:
    """Starts server, sites and run, and stops them all, however this ends."""
    link = SuperLink(folder / FLOWER)
    sites = [SiteProcesses(site, "") for site in sorted((folder / "sites").iterdir())]
    rounds = load(folder / "config.toml").training.rounds
    (folder / STATUS).unlink(missing_ok=True)
    with stoppable(f"stopped; go on with: fedlora resume {folder}"):
        try:
            with Watch(folder, rounds, progress) as watch:
                link.start()
                for site in sites:
                    site.superlink = link.address
                    site.start()
                link.submit(folder)
                supervise(folder, link, sites, watch)
        finally:
            stop_server(folder)  # first: it would take the end of the sites for lost replies
            for site in sites:
                site.stop()
            if link.process is not None:
                link.process.stop()
    return result(folder)


def stop_server(folder: Path) -> None:
    """Ends the run's server process, if one is there: what is on disk is always whole."""
    status = read(folder / STATUS)
    if status.get("state") in ("starting", "running") and alive(int(status["pid"])):
        os.kill(int(status["pid"]), signal.SIGKILL)
        wait_for_end(int(status["pid"]))


def supervise(folder: Path, link: SuperLink, sites: list[SiteProcesses], watch: Watch) -> None:
    """Until the run has finished: starts again what ended by itself. UserError where the run failed."""
    attempts, rounds = 0, -1
    while True:
        watch.look()
        status = read(folder / STATUS)
        state = status.get("state", "submitted")
        if state == "finished":
            return
        if state == "failed":
            raise UserError(f"{folder}: the run failed: {status['problem']}", f"see {folder / 'run.log'}")
        for site in sites:
            site.watch()
        down = link.process is not None and not link.process.running
        if down or (state != "submitted" and not alive(int(status["pid"]))):
            attempts, rounds = (attempts + 1, rounds) if watch.round <= rounds else (1, watch.round)
            if attempts > RESTARTS:
                raise UserError(
                    f"{folder}: the server ended {RESTARTS} times without a round between",
                    f"see {folder / FLOWER / 'superlink.log'}; go on with: {again(folder)}",
                )
            watch.say(f"the {'SuperLink' if down else 'server'} has ended: started again from the last checkpoint")
            if state != "submitted":
                wait_for_end(int(status["pid"]))
            (folder / STATUS).unlink(missing_ok=True)
            if down:
                link.start()
            link.submit(folder)
        time.sleep(LOOK)


def wait_for_end(pid: int, seconds: float = 30.0) -> None:
    """Until a server process whose SuperLink is gone has noticed; then it is ended."""
    end = time.monotonic() + seconds
    while alive(pid):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def read(file: Path) -> Mapping[str, Any]:
    """A JSON file; nothing where it is not there."""
    return json.loads(file.read_text()) if file.exists() else {}


def alive(pid: int) -> bool:
    """Whether a process is there (and no zombie)."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def result(folder: Path) -> Result:
    """What a finished run's folder says."""
    return Result(folder, read(folder / "summary.json"), tuple(files.lines(folder / "metrics.jsonl")))
