"""A round between processes on one machine: what it costs beyond training, and the stock way beside it."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.report import Report
from fedlora.engines.flower.processes import HOST, Process, SuperLink, environment, free_port

SITES, ROWS = 3, 96
TOPICS = {"animals": ["cat", "horse", "hen"], "tools": ["saw", "axe", "file"], "fruit": ["fig", "pear", "plum"]}
STOCK = Path(__file__).parent / "stock_flower"


def examples(file: Path, seed: int, site: int | None = None) -> None:
    """Sentences on three topics."""
    draw = random.Random(seed)
    with file.open("w") as out:
        for number in range(ROWS * (SITES if site is None else 1)):
            topic = draw.choice(sorted(TOPICS))
            text = f"someone sees the {draw.choice(TOPICS[topic])} near number {draw.randint(1, 10**6)}"
            row = {"text": text, "label": topic, "hospital": f"h{number % SITES}"}
            out.write(json.dumps(row) + "\n")


def ours(folder: Path, rounds: int) -> list[dict[str, float]]:
    """``fedlora federate``: seconds of each round, of its slowest site's training, and Flower's polling in it."""
    examples(folder / "mine.jsonl", 0)
    config: dict[str, Any] = {
        "model": {"name": "minilm", "task": "text-classification", "dtype": "float32"},
        "data": {"train": "mine.jsonl", "text": "text", "label": "label"},
        "algorithm": {"name": "fedit"},
        "training": {"rounds": rounds, "epochs": 1, "batch_size": 16, "eval_every": 0},
        "engine": {"lanes": 1},
    }
    config["data"]["partition"] = {"by": "column", "column": "hospital"}
    (folder / "run.toml").write_text(tomli_w.dumps(config))
    run = folder / "run"
    words = [sys.executable, "-m", "fedlora.cli", "federate", str(folder / "run.toml"), "--out", str(run)]
    done = subprocess.run([*words, "--sites", str(SITES)], capture_output=True, text=True, env=quiet())
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    moments = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    log = (run / "run.log").read_text()
    loads = sum((site / "logs" / "worker.log").read_text().count(": loading") for site in (run / "sites").iterdir())
    found = []
    for line in lines[1:]:
        own = [m for m in moments if m.get("round") == line["round"] and m["event"] in ("asked", "answered")]
        asked, heard = own[0]["time"], max(m["time"] for m in own[: 1 + SITES])
        slowest, waited = polling(run, asked, heard)
        training = line["sites"][slowest]["seconds"]
        found.append({"seconds": heard - asked, "training": training, "polling": waited})
    return [{**one, "loads": loads, "warnings": log.count("WARNING")} for one in found]


def polling(run: Path, asked: float, heard: float) -> tuple[str, float]:
    """The site that answered last, and its time from the question until its SuperNode had pulled it and from its answer
    until the server had it. These are Flower's fixed sleeps (3 s and 0.5 s) and its transport."""
    last = []
    for site in (run / "sites").iterdir():
        inside = {"in": 0.0, "out": 0.0}
        for line in (site / "logs" / "runner.log").read_text().splitlines():
            words = line.split()
            if len(words) > 4 and words[3] == "fedlora.runner:" and words[4] in ("in:", "out:"):
                moment = time.mktime(time.strptime(f"{words[0]} {words[1][:8]}", "%Y-%m-%d %H:%M:%S"))
                moment += int(words[1][9:]) / 1000
                if asked <= moment <= heard + 0.5:
                    inside[words[4][:-1]] = moment
        last.append((inside["out"], site.name, inside["in"] - asked + max(heard - inside["out"], 0.0)))
    return max(last)[1:]


def stock(folder: Path, rounds: int) -> list[dict[str, float]]:
    """A ClientApp that loads its base for every message, under Flower's own FedAvg."""
    app, log = folder / "app", folder / "rounds.jsonl"
    shutil.copytree(STOCK, app)
    link = SuperLink(folder / "flower").start()
    nodes = []
    try:
        for site in range(SITES):
            data = folder / f"site-{site}.jsonl"
            examples(data, site, site)
            words = ["flower-supernode", "--insecure", "--superlink", link.address, "--node-config", f'data="{data}"']
            words += ["--host", HOST, "--port", str(free_port())]
            env = environment(folder / f"home-{site}")
            nodes.append(Process(f"node {site}", words, folder / f"node-{site}.log", env).start())
        home = folder / "flower" / "home"
        home.mkdir(exist_ok=True)
        known = {"superlink": {"default": "run", "run": {"address": link.address, "insecure": True}}}
        (home / "config.toml").write_text(tomli_w.dumps(known))
        words = ["flwr", "run", str(app), "run", "--run-config", f'rounds={rounds} log="{log}"']
        subprocess.run(words, check=True, capture_output=True, env=environment(home), stdin=subprocess.DEVNULL)
        end = time.monotonic() + 600
        while not (log.exists() and "finished" in log.read_text()):
            if time.monotonic() > end:
                raise TimeoutError((folder / "flower" / "superlink.log").read_text()[-2000:])
            time.sleep(0.5)
    finally:
        for process in (*nodes, link.process):
            if process is not None:
                process.stop()
    return [one for one in map(json.loads, log.read_text().splitlines()) if "seconds" in one]


def quiet() -> Mapping[str, str]:
    """One thread a process: the sites share two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(quick: bool = False) -> Report:
    """Medians over rounds, the first left out (sites load their base before it)."""
    rounds = 3 if quick else 8
    os.environ.update(quiet())
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "ours").mkdir()
        (Path(place) / "stock").mkdir()
        mine, theirs = ours(Path(place) / "ours", rounds)[1:], stock(Path(place) / "stock", rounds)[1:]

    def middle(found: list[dict[str, float]], what: str, *less: str) -> float:
        return statistics.median(one[what] - sum(one[name] for name in less) for one in found)

    rows = [
        (
            "fedlora federate",
            middle(mine, "seconds"),
            middle(mine, "training"),
            middle(mine, "seconds", "training"),
            middle(mine, "polling"),
            middle(mine, "seconds", "training", "polling"),
            mine[0]["loads"] / SITES,
        ),
        (
            "plain ClientApp",
            middle(theirs, "seconds"),
            middle(theirs, "training"),
            middle(theirs, "seconds", "training"),
            None,
            None,
            float(rounds),
        ),
    ]
    return Report(
        "flower",
        "A round of federation on one machine",
        (
            "way",
            "seconds a round",
            "training",
            "beyond training",
            "of it Flower's polling",
            "of it ours",
            "base loaded",
        ),
        rows,
        (
            f"{SITES} sites, MiniLM, LoRA rank 8, {ROWS} examples a site, one epoch in batches of 16; medians of "
            f"{rounds - 1} rounds, the first left out; training is that of the site that answered last",
            "Flower's polling: a SuperNode sleeps 3 s after an empty pull and 0.5 s before it looks for an answer",
            "base loaded: how often at each site in the run; the plain ClientApp is a new process for each message",
        ),
        {"rounds": {"fedlora": mine, "stock": theirs}},
    )
