"""A federation between machines: the server's programs, and a site's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.engines.flower.federate import FLOWER, alive, is_federated, read, result, supervise
from fedlora.engines.flower.host import NODES
from fedlora.engines.flower.plan import planned, require_same
from fedlora.engines.flower.processes import (
    HOST,
    Process,
    SiteProcesses,
    SuperLink,
    environment,
    require_free,
    stoppable,
    wait_for_port,
)
from fedlora.engines.flower.server_app import EVENTS, STATUS
from fedlora.engines.flower.watch import require_prometheus, watched
from fedlora.errors import UserError
from fedlora.sites import keys, settings
from fedlora.study import folder as files
from fedlora.study.config import RunConfig, load
from fedlora.study.run import Result

CURRENT = "current.json"
PORT = 9092
LOOK, SLOW = 0.5, 60.0
SLACK = 2**20
"""Bytes that Flower's records add to a frame: the server, not the door, says that a frame is too large."""
Say = Callable[[str], None]


# -- the server


def serve(
    config: RunConfig,
    name: str,
    server: Path,
    *,
    sites: int = 1,
    host: str = "0.0.0.0",
    port: int = PORT,
    insecure: bool = False,
    out: Path | None = None,
    progress: bool = False,
    metrics: tuple[str, int] | None = None,
) -> Result:
    """Runs a federation whose sites dial in, from its last checkpoint where its folder is there already.

    ``server``: the folder of ``fedlora server init``. ``metrics``: where Prometheus may ask, host and port. Raises
    UserError for what the user can put right, Interrupted on Ctrl-C (the same command goes on).
    """
    require_prometheus(metrics)
    if not insecure:
        require_valid(server)
    require_free(host, port)
    server = server.resolve()  # its programs may be elsewhere
    folder = (out or server / "runs" / name).resolve()
    if is_federated(folder):
        require_same(config, folder, sites)
    else:
        planned(config, files.fresh(folder, name), sites)
    with stoppable(f"stopped; the same command goes on from the last checkpoint of {folder}"):
        operate(folder, server, host, port, insecure, progress, metrics)
    return result(folder)


def require_valid(server: Path) -> None:
    """Refuses to start with certificates that no site would accept, or without a site that may come."""
    authority, own = (keys.read_certificate(server / name) for name in (keys.CA, keys.SERVER))
    for file, problem in (
        (keys.CA, keys.certificate_problem(authority)),
        (keys.SERVER, keys.certificate_problem(own, authority)),
    ):
        if problem:
            raise UserError(f"{server / file}: {problem}", "fedlora server init --renew")
    if not keys.allowed(server):
        raise UserError(f"{server / keys.ALLOWED}: no site is allowed", "fedlora server allow SITE.pub --name SITE")


def operate(
    folder: Path,
    server: Path,
    host: str,
    port: int,
    insecure: bool,
    progress: bool,
    metrics: tuple[str, int] | None = None,
) -> None:
    """The SuperLink on the loopback interface, the door before it, and the run."""
    link, config = superlink(server, insecure), load(folder / "config.toml")
    words = [*door_words(link, server, host, port, insecure), "--message", str(config.engine.message + SLACK)]
    front = Process("door", words, server / "door.log", environment(server))
    (folder / STATUS).unlink(missing_ok=True)
    try:
        with watched(folder, config.training.rounds, progress, metrics) as watch:
            link.start()
            root = None if insecure else server / keys.CA
            nodes = {} if insecure else registered(server, link, root)
            files.write_json(folder / NODES, nodes) if nodes else (folder / NODES).unlink(missing_ok=True)
            front.start()
            wait_for_port(host, port, front)
            watch.say(f"listening on {host}:{port}; sites allowed: {', '.join(nodes.values()) or 'any (insecure)'}")
            about = {"folder": str(folder.resolve()), "address": f"{host}:{port}", "pid": os.getpid()}
            files.write_json(server / CURRENT, about)
            link.submit(folder, root)
            supervise(folder, link, [], watch)
    finally:
        front.stop()
        if link.process is not None:
            link.process.stop()


def superlink(server: Path, insecure: bool) -> SuperLink:
    """Flower's server, with its state in the server's folder."""
    if insecure:
        return SuperLink(server / FLOWER)
    words = ["--ssl-ca-certfile", keys.CA, "--ssl-certfile", keys.SERVER, "--ssl-keyfile", keys.SERVER_KEY]
    secure = [word if word.startswith("--") else str(server / word) for word in words]
    return SuperLink(server / FLOWER, secure=(*secure, "--enable-supernode-auth"))


def door_words(link: SuperLink, server: Path, host: str, port: int, insecure: bool) -> list[str]:
    """The command of the door."""
    from fedlora.engines.flower.processes import free_port

    link.port = link.port or free_port()
    words = [sys.executable, "-m", "fedlora.engines.flower.door", "--host", host, "--port", str(port), "--target"]
    if insecure:
        return [*words, f"http://{HOST}:{link.port}"]
    words += [f"https://{HOST}:{link.port}", "--ca", str(server / keys.CA)]
    return [*words, "--cert", str(server / keys.SERVER), "--key", str(server / keys.SERVER_KEY)]


def registered(server: Path, link: SuperLink, root: Path | None) -> dict[str, str]:
    """Flower's number of each allowed site's node; keys that are new are registered, those that went are removed."""
    flwr = Flwr(link, root)
    file = server / FLOWER / "registered.json"
    known: dict[str, dict[str, str]] = dict(read(file))
    wanted = {name: (server / keys.ALLOWED / f"{name}.pub").read_text() for name in keys.allowed(server)}
    for name in [name for name, entry in known.items() if wanted.get(name) != entry["key"]]:
        flwr.call("unregister", known.pop(name)["node"])
    for name in sorted(wanted.keys() - known.keys()):
        told = flwr.call("register", str(server / keys.ALLOWED / f"{name}.pub"), name=name)
        known[name] = {"key": wanted[name], "node": str(told["node-id"])}
        files.write_json(file, known)
    files.write_json(file, known)
    return {entry["node"]: name for name, entry in sorted(known.items())}


@dataclass(frozen=True)
class Flwr:
    """Flower's own command line on this server's SuperLink."""

    link: SuperLink
    root: Path | None

    def call(self, what: str, subject: str, name: str | None = None) -> Mapping[str, Any]:
        """``flwr supernode WHAT SUBJECT``; UserError where it fails."""
        home = self.link.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        security = {"root-certificates": str(self.root.resolve())} if self.root else {"insecure": True}
        connection = {"default": "run", "run": {"address": self.link.address, **security}}
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": connection}))
        words = ["flwr", "supernode", what, subject, "run", *(("--name", name) if name else ()), "--format", "json"]
        done = subprocess.run(words, capture_output=True, text=True, env=environment(home), stdin=subprocess.DEVNULL)
        try:
            told = json.loads(done.stdout)
        except ValueError:
            told = {}
        if not told.get("success"):
            reason = str(told.get("error-message") or done.stderr or done.stdout).strip()[-300:]
            raise UserError(
                f"flwr supernode {what} {subject}: {reason}",
                f"if the key is in use already, remove {self.link.folder} and start again",
            )
        return told


def status(server: Path) -> list[str]:
    """What a server is doing, a line each: from its files, so that it works while it runs and after it ended."""
    lines: list[str] = []
    if (server / keys.SERVER).exists():
        own = keys.read_certificate(server / keys.SERVER)
        lines.append(
            f"certificate: {keys.certificate_problem(own) or f'valid until {own.not_valid_after_utc:%Y-%m-%d}'}"
        )
        lines.append(f"sites allowed: {', '.join(keys.allowed(server)) or 'none'}")
    current = read(server / CURRENT)
    if not current:
        return [*lines, "no run has been started"]
    folder = Path(current["folder"])
    state = read(folder / STATUS)
    up = alive(int(current["pid"]))
    lines.append(f"server: {'listening on ' + current['address'] if up else 'not running'}")
    lines.append(
        f"run: {folder}: {state.get('state', 'starting' if up else 'not started')} {state.get('problem', '')}".rstrip()
    )
    done = list(files.lines(folder / "metrics.jsonl"))
    total = load(folder / "config.toml").training.rounds
    if done:
        last = done[-1]
        lines.append(f"round {last['round']} of {total}: {last['participants']} took part, {last['seconds']:.1f} s")
        lines += [f"  lost: {name}" for name in last["lost"]]
        lines += [f"  refused: {name}: {reason}" for name, reason in last["rejected"].items()]
    return lines + [f"  {line}" for line in heard(folder)]


def heard(folder: Path) -> list[str]:
    """The last word on each site."""
    last: dict[str, str] = {}
    for event in files.lines(folder / EVENTS):
        if "site" in event:
            reason = f": {event['reason']}" if "reason" in event else ""
            last[str(event["site"])] = f"{event['event']}{reason}"
    return [f"site {name}: {what}" for name, what in sorted(last.items())]


# -- a site


@dataclass(eq=False)
class SiteRun:
    """A site's programs, and what of their logs a person should see."""

    site: settings.SiteSettings
    folder: Path
    say: Say
    seen: dict[str, int] = field(default_factory=dict[str, int])

    def start(self) -> SiteProcesses:
        """Starts worker and SuperNode."""
        secure = ["--insecure"]
        if not self.site.server.insecure:
            if problem := keys.private_problem(Path(self.site.server.key)):
                raise UserError(problem, f"fedlora site check {self.folder}")
            keys.read_certificate(Path(self.site.server.ca))
            secure = ["--root-certificates", self.site.server.ca]
            secure += ["--auth-supernode-private-key", self.site.server.key]
        if self.site.resources.threads:
            os.environ["OMP_NUM_THREADS"] = str(self.site.resources.threads)
        return SiteProcesses(self.folder, self.site.server.address, secure).start()

    def look(self) -> None:
        """Shows new lines that matter: what leaves, what is refused, what Flower could not do."""
        for name, words in WORTH.items():
            file = self.folder / "logs" / f"{name}.log"
            for line in self._new(file):
                if any(word in line for word in words) or line.startswith(REMEDY):
                    self.say(line.rstrip())
                if hint := next((hint for word, hint in HINTS.items() if word in line), None):
                    self.say(f"  -> {hint}")

    def _new(self, file: Path) -> Iterator[str]:
        if not file.exists():
            return
        size = file.stat().st_size
        start = min(self.seen.get(file.name, size), size)
        with file.open("rb") as source:
            source.seek(start)
            text = source.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.seen[file.name] = start + len(whole)
        yield from whole.decode(errors="replace").splitlines()


WORTH = {
    "worker": ("INFO fedlora", "WARNING", "ERROR"),
    "supernode": ("retrying", "ERROR", "SuperNode ID", "[code:", "CERTIFICATE_VERIFY"),
}
REMEDY = "  -> "  # the second line of what a person can put right (``UserError``)
HINTS = {
    "[code: 2004]": (
        "the server does not know this site's key, or still counts this site (or another with the same key) as "
        "connected: after a crash this passes within about a minute; otherwise: fedlora server allow, and a restart"
    ),
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not accepted: fedlora site check says why",
}


def attend(folder: Path, say: Say) -> None:
    """A site takes part in whatever its server runs, until it is stopped; what ends by itself is started again."""
    site = settings.load(folder)
    if site.server.insecure:
        say("INSECURE: no TLS and no key; for trials on one machine only")
    run = SiteRun(site, folder, say)
    for name in WORTH:
        file = folder / "logs" / f"{name}.log"
        run.seen[file.name] = file.stat().st_size if file.exists() else 0
    with stoppable(f"stopped; start again with: fedlora site start {folder}"):
        processes = run.start()
        say(f"site {site.name} dials {site.server.address}; it allows {allowed_text(site)}")
        wait, since = LOOK, time.monotonic()
        try:
            while True:
                run.look()
                if processes.node is not None and not processes.node.running:  # refused: not to be asked in a hurry
                    wait = min(wait * 2, SLOW) if time.monotonic() < since + SLOW else LOOK
                    time.sleep(wait)
                    since = time.monotonic()
                processes.watch()
                time.sleep(LOOK)
        finally:
            processes.stop()


def allowed_text(site: settings.SiteSettings) -> str:
    """What the site's owner allows, in one line."""
    allow = site.allow
    names = allow.algorithms if isinstance(allow.algorithms, str) else ", ".join(allow.algorithms)
    caps = f"{allow.steps:,} steps, {allow.seconds:g} s and {allow.bytes:,} bytes a request"
    return f"{names} algorithms; upload of {', '.join(allow.upload) or 'nothing'}; {caps}"
