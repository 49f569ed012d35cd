"""``fedlora site ...`` and ``fedlora server ...``: thin, like the rest of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora.errors import UserError

site = typer.Typer(
    help="One site of a federation between machines: its keys, its data, its limits.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
server = typer.Typer(
    help="The server of a federation between machines: certificates, allowed sites, runs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SiteFolder = Annotated[Path, typer.Argument(metavar="SITE", help="the site's folder")]
ServerFolder = Annotated[Path, typer.Option("--folder", help="the server's folder")]
SERVER = Path("server")


@site.command("init")
def site_init(
    name: Annotated[str, typer.Argument(help="the site's name in the federation")],
    address: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="what the site dials")],
    ca: Annotated[Path | None, typer.Option(help="the server's ca.pem")] = None,
    train: Annotated[str, typer.Option(help="the file with the site's examples")] = "train.csv",
    text: Annotated[str | None, typer.Option(help="its column of texts")] = None,
    label: Annotated[str | None, typer.Option(help="its column of labels")] = None,
    prompt: Annotated[str | None, typer.Option(help="its column of prompts (language models)")] = None,
    response: Annotated[str | None, typer.Option(help="its column of responses")] = None,
    image: Annotated[str | None, typer.Option(help="its column of images")] = None,
    names: Annotated[
        list[str] | None, typer.Option("--map", metavar="OWN=RUN", help="own label name = the run's; may be repeated")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="the largest rank this site trains (default: the run's)")] = None,
    folder: Annotated[Path | None, typer.Option(help="where to write (default: NAME)")] = None,
) -> None:
    """Make a site's key pair and its site.toml."""
    from fedlora.sites import keys

    given = {"text": text, "label": label, "prompt": prompt, "response": response, "image": image}
    columns = {key: value for key, value in given.items() if value is not None}
    place = folder or Path(name)
    pairs = [one.partition("=") for one in names or ()]
    if wrong := [one for one, (own, mark, target) in zip(names or (), pairs) if not (own and mark and target)]:
        raise UserError(f"--map {wrong[0]!r}: not of the form OWN=RUN", "for example --map gut=benign")
    labels = {own: target for own, _, target in pairs}
    for file in keys.site_init(
        place, name, address, ca=ca, train=train, columns=columns or None, labels=labels, rank=rank
    ):
        typer.echo(f"wrote {file}")
    typer.echo(f"next: send {place / keys.SITE_PUBLIC} to the server, look through {place / 'site.toml'}, then")
    typer.echo(f"      fedlora site check {place}")


@site.command("check")
def site_check(
    folder: SiteFolder,
    run: Annotated[Path | None, typer.Option(help="the run file that the site is to take part in")] = None,
) -> None:
    """Try data, model, one local step, server and certificate; each line says pass or FAIL, and what to do."""
    from fedlora.sites.check import check
    from fedlora.study.config import load

    bad = 0
    for line in check(folder, None if run is None else load(run)):
        typer.echo(str(line))
        bad += line.ok is False
    if bad:
        raise UserError(f"{folder}: {bad} of the checks failed", "see the lines above")


@site.command("start")
def site_start(folder: SiteFolder) -> None:
    """Take part in what the server runs, until stopped; prints what leaves."""
    from fedlora.engines.flower.deployed import attend

    attend(folder, typer.echo)


@server.command("init")
def server_init(
    host: Annotated[
        list[str] | None,
        typer.Option(help="a name or address that sites dial; may be repeated (with --renew: default those of before)"),
    ] = None,
    folder: ServerFolder = SERVER,
    days: Annotated[int, typer.Option(help="how long the server's certificate is valid")] = 825,
    renew: Annotated[bool, typer.Option("--renew", help="a new certificate from the authority that is there")] = False,
) -> None:
    """Make the federation's authority, the server's certificate, and the list of allowed sites."""
    from fedlora.sites import keys

    for file in keys.server_init(folder, host or (), days=days, renew=renew):
        typer.echo(f"wrote {file}")
    if not renew:
        typer.echo(f"next: give {folder / keys.CA} to the sites; {folder / keys.CA_KEY} stays here, best offline")
        typer.echo("      fedlora server allow SITE.pub --name SITE")


@server.command("allow")
def server_allow(
    key: Annotated[Path, typer.Argument(metavar="SITE.pub", help="the site's public key")],
    name: Annotated[str, typer.Option(help="the site's name")],
    folder: ServerFolder = SERVER,
) -> None:
    """Put a site's public key on the list of allowed ones."""
    from fedlora.sites import keys

    typer.echo(f"wrote {keys.allow(folder, key, name)}")


@server.command("start")
def server_start(
    file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run file; [data] names columns and labels")],
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE")] = None,
    sites: Annotated[int, typer.Option(help="how many sites must be there before the first round")] = 1,
    host: Annotated[str, typer.Option(help="the address to listen on")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="the port that sites dial")] = 9092,
    folder: ServerFolder = SERVER,
    out: Annotated[Path | None, typer.Option(help="the run folder (default: FOLDER/runs/RUN)")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="no TLS, no keys: for trials on one machine")] = False,
    metrics_port: Annotated[int | None, typer.Option(help="answer Prometheus there (default: not at all)")] = None,
    metrics_host: Annotated[str, typer.Option(help="the address for that")] = "127.0.0.1",
) -> None:
    """Run a federation whose sites dial in; the same command goes on where it was stopped."""
    from fedlora.engines.flower.deployed import serve
    from fedlora.study.config import load
    from fedlora.study.report import table

    config = load(file, changes or [])
    metrics = None if metrics_port is None else (metrics_host, metrics_port)
    options = {"sites": sites, "host": host, "port": port, "insecure": insecure, "out": out, "metrics": metrics}
    result = serve(config, file.stem, folder, progress=True, **options)  # type: ignore[arg-type]
    Console().print(table(result))


@server.command("status")
def server_status(folder: ServerFolder = SERVER) -> None:
    """Say what the server is doing: sites, round, losses and refusals."""
    from fedlora.engines.flower.deployed import status

    for line in status(folder):
        typer.echo(line)
