"""The templates in deploy/ and the page call commands that exist, open one port on servers and none on sites."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from fedlora.cli import app

ROOT = Path(__file__).parents[2]
UNITS = ("fedlora-server.service", "fedlora-site.service")


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of a fedlora command line; click refuses what does not exist."""
    command: Any = typer.main.get_command(app)
    context = click.Context(command)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
        context = click.Context(command, parent=context, info_name=name)
    return command.make_context("x", list(words), parent=context.parent).params


def unit(name: str) -> configparser.ConfigParser:
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read(ROOT / "deploy" / name)
    return found


def test_the_units_start_what_there_is() -> None:
    server, site = (shlex.split(unit(name)["Service"]["ExecStart"])[1:] for name in UNITS)
    assert parsed(server)["port"] == 9092
    assert not parsed(server)["insecure"]
    assert str(parsed(site)["folder"]) == "site"
    for name in UNITS:
        service = unit(name)["Service"]
        assert (service["User"], service["NoNewPrivileges"], service["UMask"]) == ("fedlora", "yes", "0077")
        assert "130" in service["SuccessExitStatus"]  # stopped on purpose


def test_the_compose_file_opens_one_port_and_none_at_a_site() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    assert services["server"]["ports"] == ["9092:9092"]
    assert "ports" not in services["site"]
    for service in services.values():
        options = parsed([str(word) for word in service["command"]])
        assert not options.get("insecure")
        assert service["cap_drop"] == ["ALL"]


def test_every_command_of_the_page_and_of_the_templates_comments_exists() -> None:
    page = (ROOT / "docs" / "federation.md").read_text()
    comments = [path.read_text() for path in sorted((ROOT / "deploy").iterdir())]
    found = re.findall(r"^fedlora (.*)$", page, re.M)
    found += re.findall(r"`fedlora (server start [^`]*--metrics-port[^`]*)`", page)
    assert len(found) >= 11
    noted = [one for text in comments for one in re.findall(r"^# +fedlora (.*)$", text, re.M)]
    noted += [one for text in comments for one in re.findall(r"^# +docker compose run --rm \w+ (.*)$", text, re.M)]
    assert len(noted) == 7
    for line in found + noted:
        parsed(shlex.split(line))


def test_all_templates_and_the_page_mean_one_port() -> None:
    page = (ROOT / "docs" / "federation.md").read_text()
    texts = [page, *(path.read_text() for path in sorted((ROOT / "deploy").iterdir()))]
    default = parsed(["server", "start", "run.toml"])["port"]
    said = {int(port) for text in texts for port in re.findall(r"(?:TCP |:|--port[\", ]+)(\d{4})\b", text)}
    assert said == {default, 9100}  # the other is Prometheus', on the loopback interface
    assert parsed(["server", "start", "run.toml"])["metrics_host"] == "127.0.0.1"
    assert f"TCP {default} (`--port`)" in page
    service = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["server"]
    assert service["ports"] == [f"{default}:{parsed([str(word) for word in service['command']])['port']}"]


def test_the_image_has_what_the_project_offers_and_works_where_the_volume_is() -> None:
    file = (ROOT / "deploy" / "Dockerfile").read_text()
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = re.search(r'"\.\[([\w,-]+)\]"', file)
    assert wanted is not None
    assert {"flower", "minilm"} <= set(wanted[1].split(",")) <= offered.keys()
    copied = [word for line in re.findall(r"^COPY (.*)$", file, re.M) for word in line.split()[:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    workdir = re.findall(r"^WORKDIR (.*)$", file, re.M)[-1]
    for service in yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"].values():
        assert [volume.split(":")[1] for volume in service["volumes"]] == [workdir]


def verified(folder: Path, name: str, change: tuple[str, str] = ("", "")) -> str:
    """What systemd says of a unit, its program replaced by one that is on every machine."""
    text = (ROOT / "deploy" / name).read_text().replace("/opt/fedlora/bin/fedlora", shutil.which("true") or "true")
    (folder / name).write_text(text.replace(*change) if change[0] else text)
    words = ["systemd-analyze", "verify", "--man=no", str(folder / name)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).strip() or ("" if done.returncode == 0 else f"exit code {done.returncode}")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_the_units(name: str, tmp_path: Path) -> None:
    assert verified(tmp_path, name) == ""
    assert "Restrat" in verified(tmp_path, name, ("Restart=", "Restrat="))  # it would have said so


def test_what_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(click.exceptions.NoSuchOption):
        parsed(["server", "start", "run.toml", "--prot", "1"])
