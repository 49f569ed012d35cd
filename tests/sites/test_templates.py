"""The templates in deploy/ and the page call commands that exist, open one port on servers and none on sites."""

from __future__ import annotations

import configparser
import re
import shlex
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
    texts = [(ROOT / "docs" / "federation.md").read_text()]
    found = [line for text in texts for line in re.findall(r"^fedlora .*$", text, re.M)]
    assert len(found) >= 10
    for line in found:
        parsed(shlex.split(line)[1:])


def test_what_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(click.exceptions.NoSuchOption):
        parsed(["server", "start", "run.toml", "--prot", "1"])
