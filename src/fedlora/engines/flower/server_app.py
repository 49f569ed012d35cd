"""The ServerApp: the project's own loop over the Grid, in the run folder that the submission names."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
STATUS, EVENTS = "status.json", "events.jsonl"


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Goes on with the run of a folder, from its last checkpoint."""
    drive(grid, Path(str(context.run_config["folder"])))


def drive(grid: Grid, folder: Path) -> None:
    """The run, its events, and how it ended (``status.json``)."""
    from fedlora.engines.flower.fleet import Patience
    from fedlora.engines.flower.host import federation
    from fedlora.errors import UserError
    from fedlora.study import folder as files
    from fedlora.study.config import load
    from fedlora.study.run import proceed

    def status(state: str, problem: str = "") -> None:
        files.write_json(folder / STATUS, {"state": state, "pid": os.getpid(), "problem": problem})

    def say(event: Mapping[str, Any]) -> None:
        with (folder / EVENTS).open("a") as out:
            out.write(json.dumps({"time": time.time(), **event}) + "\n")

    status("starting")
    try:
        with files.owned(folder):
            config = load(folder / "config.toml")
            patience = Patience(config.engine.deadline, config.engine.quorum, config.engine.join)
            host = federation(config, folder, grid, patience, say)
            begun = (folder / "metrics.jsonl").exists()
            host.fleet.available(2 if begun else 1)  # the sites, before any round's clock starts
            status("running")
            proceed(host)
    except UserError as problem:
        status("failed", str(problem))
        raise
    except httpx.HTTPError:  # the SuperLink is gone: whoever starts it again starts this again
        raise
    except Exception as problem:
        status("failed", f"{type(problem).__name__}: {problem}")
        raise
    status("finished")
