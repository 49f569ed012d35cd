"""What a server tells Prometheus: the numbers of its own files, no names, and only where it was asked to."""

from __future__ import annotations

import importlib.util
import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("flwr")
pytest.importorskip("prometheus_client")

from fedlora.cli import app
from fedlora.engines.flower.deployed import serve
from fedlora.engines.flower.watch import watched
from fedlora.errors import UserError
from fedlora.study.config import parse
from fedlora.study.folder import append

HOST = "127.0.0.1"
SECRETS = ("ward-7", "clinic-north", "malign")
RUN = {
    "model": {"name": "minilm", "task": "text-classification"},
    "data": {"labels": ["benign", "malign"]},
    "algorithm": {"name": "fedit"},
}


def line(round: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "round": round,
        "loss": 0.5 / round if round else None,
        "participants": 3 if round else 0,
        "lost": [],
        "rejected": {},
        "bytes": {"up": 100 * round, "down": 10 * round, "setup_up": 0 if round else 7, "setup_down": 0},
        "seconds": 1.5 * round,
        **changes,
    }


def scraped(said: str) -> dict[str, float]:
    """Each series and its value."""
    rows = [row.rpartition(" ") for row in said.splitlines() if row and not row.startswith("#")]
    return {name: float(value) for name, _, value in rows if "_created" not in name}


def ask(port: int) -> str:
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=20) as answer:
        return answer.read().decode()


def port_of(watch: Any, capsys: pytest.CaptureFixture[str]) -> int:
    """Where it said that it answers."""
    return int(capsys.readouterr().err.split(f"http://{HOST}:")[1].split("/")[0])


def test_a_scrape_tells_rounds_replies_bytes_and_scores_and_no_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    with watched(tmp_path, 3, True, (HOST, 0)) as watch:
        port = port_of(watch, capsys)
        assert scraped(ask(port))["fedlora_round_seconds_count"] == 0
        append(rounds, line(0))
        append(events, {"event": "joined", "site": "clinic-north", "clients": 2})
        append(events, {"event": "refused", "site": "clinic-north", "reason": "label 'malign' is unknown"})
        watch.look()
        scores = {"personal": {"mean": 0.75, "std": 0.1}, "global": 0.5}
        append(rounds, line(1, lost=["ward-7"], rejected={"ward-7": "norm"}, participants=1, **scores))
        append(events, {"event": "silent", "site": "clinic-north", "round": 1})
        append(rounds, line(2))
        watch.look()
        watch.look()
        said = ask(port)
        found = scraped(said)
    assert found["fedlora_rounds_planned"] == 3
    assert found["fedlora_round"] == 2
    assert (found["fedlora_round_seconds_count"], found["fedlora_round_seconds_sum"]) == (3, 4.5)
    assert [found[f'fedlora_replies_total{{what="{what}"}}'] for what in ("replied", "lost", "refused")] == [4, 1, 1]
    assert found['fedlora_bytes_total{of="rounds",way="up"}'] == 300
    assert found['fedlora_bytes_total{of="rounds",way="down"}'] == 30
    assert found['fedlora_bytes_total{of="setup",way="up"}'] == 7
    assert [found[f"fedlora_sites_{what}_total"] for what in ("joined", "refused", "late")] == [1, 1, 1]
    assert (found['fedlora_score{model="personal"}'], found['fedlora_score{model="global"}']) == (0.75, 0.5)
    assert found["fedlora_train_loss"] == 0.25
    assert not [word for word in SECRETS if word in said]
    with pytest.raises(OSError):
        ask(port)  # it ended with the run


def test_a_server_that_is_started_again_goes_on_counting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = tmp_path / "metrics.jsonl"
    for number in range(3):
        append(rounds, line(number))
    with watched(tmp_path, 4, True, (HOST, 0)) as watch:
        port = port_of(watch, capsys)
        assert scraped(ask(port))['fedlora_bytes_total{of="rounds",way="up"}'] == 300
        rounds.write_text("".join(json.dumps(line(number)) + "\n" for number in range(2)))  # back to a checkpoint
        watch.look()
        append(rounds, line(2))
        append(rounds, line(3))
        watch.look()
        found = scraped(ask(port))
    assert found["fedlora_round"] == 3
    assert found["fedlora_round_seconds_count"] == 4
    assert found['fedlora_bytes_total{of="rounds",way="up"}'] == 600


def test_whoever_watches_reads_whose_update_was_dropped_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with watched(tmp_path, 3, True, None) as watch:
        refused = {"north": "weight: weight 96.0 is not in (0, 48]"}
        append(tmp_path / "metrics.jsonl", line(1, lost=["south"], rejected=refused))
        watch.look()
    said = capsys.readouterr().err
    assert "lost: south, update dropped of north: weight: weight 96.0 is not in (0, 48]" in said


def test_nobody_is_answered_unless_that_was_asked_for(tmp_path: Path) -> None:
    with watched(tmp_path, 1, False, None) as watch:
        assert watch.metrics is None


def test_a_port_that_is_taken_is_an_error_that_names_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--metrics-port {port}: cannot listen on {HOST}:{port}"):  # noqa: SIM117
            with watched(tmp_path, 1, False, (HOST, port)):
                pass


def test_without_the_library_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent = "prometheus_client"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else find(name, *rest))
    with pytest.raises(UserError, match=r"fedlora\[prometheus\]"):
        serve(parse(RUN, "run.toml"), "run", tmp_path, insecure=True, metrics=(HOST, 0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], None),
        (["--metrics-port", "9100"], (HOST, 9100)),
        (["--metrics-port", "9100", "--metrics-host", "::1"], ("::1", 9100)),
    ],
)
def test_the_command_listens_on_the_loopback_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], wanted: tuple[str, int] | None
) -> None:
    given: dict[str, Any] = {}

    def stop(*_: object, **options: Any) -> None:
        given.update(options)
        raise UserError("no further", "than this")

    monkeypatch.setattr("fedlora.engines.flower.deployed.serve", stop)
    file = tmp_path / "run.toml"
    file.write_text(
        '[model]\nname = "minilm"\ntask = "text-classification"\n[data]\nlabels = ["a", "b"]\n'
        '[algorithm]\nname = "fedit"\n'
    )
    with pytest.raises(UserError, match="no further"):
        CliRunner().invoke(app, ["server", "start", str(file), *words], catch_exceptions=False)
    assert given["metrics"] == wanted
