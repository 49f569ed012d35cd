"""What a server settles and refuses before it starts anything, and what it says of itself."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from fedlora.engines.flower.deployed import (
    SiteRun,
    allowed_text,
    registered,
    require_valid,
    serve,
    status,
)
from fedlora.engines.flower.host import Plan, again, registered_nodes
from fedlora.engines.flower.plan import planned, require_same
from fedlora.engines.flower.processes import SuperLink
from fedlora.errors import UserError
from fedlora.sites import keys
from fedlora.sites.settings import load as load_site
from fedlora.study.config import RunConfig, load, parse
from study.tiny import encoder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("base") / "enc")


def run_file(base: Path, **sections: Any) -> RunConfig:
    value: dict[str, Any] = {
        "model": {"name": str(base), "task": "text-classification"},
        "data": {"labels": ["good", "bad"], "text": "words"},
        "adapter": {"rank": 40},
        "algorithm": {"name": "flexlora"},
        "training": {"rounds": 3},
    }
    return parse({key: {**value.get(key, {}), **sections.get(key, {})} for key in {*value, *sections}}, "run.toml")


def test_a_plan_needs_no_data(base: Path, tmp_path: Path) -> None:
    planned(run_file(base, clients={"ranks": [4, 40]}), tmp_path, 3)
    plan = Plan.load(tmp_path)
    assert (plan.terms.labels, plan.terms.fields, plan.sites) == (("good", "bad"), ("text", "label"), 3)
    assert set(plan.terms.most.values()) == {32}  # the layers are 32 wide
    assert plan.terms.least == 4
    config = load(tmp_path / "config.toml")
    assert (config.model.dtype, config.engine.lanes, config.engine.tokens) == ("float32", 1, 1024)
    assert config.adapter.alpha == 64.0
    assert config.training.lr is not None


def test_what_a_server_cannot_know_is_asked_for(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\[data\] labels is missing"):
        planned(run_file(base, data={"labels": None}), tmp_path, 1)
    with pytest.raises(UserError, match="each site states its own rank"):
        planned(run_file(base, clients={"ranks": "uniform-small"}), tmp_path, 1)
    with pytest.raises(UserError, match="fedper keeps every client's head at home"):
        planned(run_file(base, algorithm={"name": "fedper"}, adapter={"extras": {"head": "share"}}), tmp_path, 1)
    with pytest.raises(UserError, match="is no federation"):
        planned(run_file(base, algorithm={"name": "pooled"}), tmp_path, 1)


def test_a_run_goes_on_as_it_began_and_may_last_longer(base: Path, tmp_path: Path) -> None:
    planned(run_file(base), tmp_path, 1)
    require_same(run_file(base, training={"rounds": 9}), tmp_path, 1)
    assert load(tmp_path / "config.toml").training.rounds == 9
    require_same(run_file(base), tmp_path, 1)  # a restart by the old file shortens nothing
    assert load(tmp_path / "config.toml").training.rounds == 9


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"algorithm": {"name": "fedit"}}, ["algorithm.name = 'flexlora' (now 'fedit')"]),
        ({"data": {"labels": ["bad", "good"]}}, ["data.labels = ['good', 'bad'] (now ['bad', 'good'])"]),
        ({"adapter": {"rank": 8}}, ["adapter.rank = 40 (now 8)", "adapter.alpha = 64.0 (now 16.0)"]),
        ({"training": {"lr": 0.5}}, ["training.lr = ", " (now 0.5)"]),
        ({"training": {"eval_clients": 2}}, ["training.eval_clients = unset (now 2)"]),
        ({"engine": {"tokens": 64, "quorum": 0.1}}, ["engine.tokens = 1024 (now 64)"]),
    ],
)
def test_settings_that_differ_from_those_a_run_began_with_are_named(
    base: Path, tmp_path: Path, changed: dict[str, Any], words: list[str]
) -> None:
    planned(run_file(base), tmp_path, 1)
    before = (tmp_path / "config.toml").read_bytes()
    with pytest.raises(UserError, match="began with other settings") as error:
        require_same(run_file(base, **changed), tmp_path, 1)
    for word in (*words, "--out another folder"):
        assert word in str(error.value)
    assert "quorum" not in str(error.value)
    assert (tmp_path / "config.toml").read_bytes() == before


def test_a_restart_may_wait_otherwise_and_for_another_number_of_sites(base: Path, tmp_path: Path) -> None:
    planned(run_file(base), tmp_path, 3)
    begun = Plan.load(tmp_path)
    patience = {"deadline": 5.0, "quorum": 1.0, "join": 30.0, "message": 2**21}
    require_same(run_file(base, engine=patience), tmp_path, 2)
    assert Plan.load(tmp_path) == replace(begun, sites=2)
    found = load(tmp_path / "config.toml").engine
    assert {key: getattr(found, key) for key in patience} == patience


def test_how_to_go_on_depends_on_where_the_sites_are(tmp_path: Path) -> None:
    assert again(tmp_path) == "the same fedlora server start"
    (tmp_path / "sites").mkdir()
    assert again(tmp_path) == f"fedlora resume {tmp_path}"


def test_a_server_starts_only_with_valid_certificates_and_somebody_allowed(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ca\.pem: No such file"):
        serve(run_file(base), "run", tmp_path)
    keys.server_init(tmp_path, ["h"], days=-1)
    with pytest.raises(UserError, match=r"server\.pem: expired on"):
        require_valid(tmp_path)
    keys.server_init(tmp_path, ["h"], renew=True)
    with pytest.raises(UserError, match="no site is allowed"):
        require_valid(tmp_path)
    keys.server_init(tmp_path / "other", ["h"])
    (tmp_path / "ca.pem").write_bytes((tmp_path / "other" / "ca.pem").read_bytes())
    with pytest.raises(UserError, match="another authority has signed it"):
        require_valid(tmp_path)
    assert not (tmp_path / "runs").exists()


def test_keys_are_registered_once_and_those_that_went_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str | None]] = []

    def call(self: Any, what: str, subject: str, name: str | None = None) -> dict[str, Any]:
        calls.append((what, name or subject))
        return {"success": True, "node-id": 100 + len(calls)}

    monkeypatch.setattr("fedlora.engines.flower.deployed.Flwr.call", call)
    keys.server_init(tmp_path, ["h"])
    for name in ("north", "south"):
        keys.site_init(tmp_path / name, name, "h:1")
        keys.allow(tmp_path, tmp_path / name / "site.pub", name)
    link = SuperLink(tmp_path / "flower")
    link.folder.mkdir()
    assert registered(tmp_path, link, None) == {"101": "north", "102": "south"}
    assert registered(tmp_path, link, None) == {"101": "north", "102": "south"}
    assert calls == [("register", "north"), ("register", "south")]
    (tmp_path / "allowed" / "north.pub").unlink()
    assert registered(tmp_path, link, None) == {"102": "south"}
    assert calls[2:] == [("unregister", "101")]
    (tmp_path / "nodes.json").write_text(json.dumps({"102": "south"}))
    assert registered_nodes(tmp_path) == {102: "south"}
    assert registered_nodes(tmp_path / "north") is None


def test_the_status_is_read_from_files(base: Path, tmp_path: Path) -> None:
    assert status(tmp_path) == ["no run has been started"]
    keys.server_init(tmp_path, ["h"])
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    planned(run_file(base), run, 1)
    about = {"folder": str(run), "address": "0.0.0.0:9092", "pid": os.getpid()}
    (tmp_path / "current.json").write_text(json.dumps(about))
    line = {"round": 2, "participants": 1, "seconds": 4.0, "lost": ["south"], "rejected": {"west": "norm: too large"}}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "status.json").write_text(json.dumps({"state": "running", "pid": 1, "problem": ""}))
    events = [{"event": "joined", "site": "north"}, {"event": "refused", "site": "east", "reason": "labels differ"}]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    shown = "\n".join(status(tmp_path))
    for word in (
        "valid until",
        "sites allowed: none",
        "listening on 0.0.0.0:9092",
        "round 2 of 3: 1 took part",
        "lost: south",
        "refused: west: norm: too large",
        "site north: joined",
        "site east: refused: labels differ",
    ):
        assert word in shown


def test_a_site_shows_what_leaves_and_what_went_wrong(tmp_path: Path) -> None:
    keys.site_init(tmp_path, "north", "h:1")
    site, shown = load_site(tmp_path), list[str]()
    assert "100,000 steps" in allowed_text(site)
    logs = tmp_path / "logs"
    logs.mkdir()
    run = SiteRun(site, tmp_path, shown.append, {"worker.log": 0, "supernode.log": 0})
    (logs / "worker.log").write_text("t INFO fedlora.x: leaves north, round 1\nt DEBUG other\nhalf a li")
    (logs / "supernode.log").write_text("INFO: nothing\n[code: 2004] Failed to activate SuperNode.\n")
    run.look()
    assert shown[0] == "t INFO fedlora.x: leaves north, round 1"
    assert "does not know this site's key, or still counts this site" in shown[-1]
    assert "passes within about a minute" in shown[-1]
    assert len(shown) == 3
    with (logs / "worker.log").open("a") as out:
        out.write("ne WARNING\n  -> what to do\n  a traceback's line\n")
    run.look()
    assert shown[3:] == ["half a line WARNING", "  -> what to do"]


def test_a_key_that_others_can_read_starts_nothing(tmp_path: Path) -> None:
    keys.site_init(tmp_path, "north", "h:1")
    (tmp_path / "site.key").chmod(0o644)
    with pytest.raises(UserError, match="can be read by others"):
        SiteRun(load_site(tmp_path), tmp_path, print).start()
