"""The command line: thin. Everything a command does is a function of ``fedlora`` that Python code can call.

Heavy libraries are imported inside the commands, so that ``fedlora --help`` answers at once.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console
from typer.core import TyperCommand

from fedlora.errors import Interrupted, UserError, refused
from fedlora.sites import commands

app = typer.Typer(
    name="fedlora",
    help="""Federated LoRA fine-tuning: clients keep their data, adapters travel.

    \b
    Start here:
      fedlora quickstart                 a whole federation on data that is on this machine
      fedlora data my.toml               who has what, before anything runs
      fedlora run my.toml                train; writes a run folder
      fedlora federate my.toml --sites 3 the same between processes, as over a network
      fedlora predict RUN --client ID --text "..."
      fedlora compare study.toml         a grid of runs over seeds, and its table

    \b
    The smallest run file:
      [model]
      name = "minilm"                    # a hub id, a folder, "minilm" or "embedded-lm"
      task = "text-classification"       # or image-classification, causal-lm
      [data]
      train = "mine.jsonl"
      text = "text"
      label = "label"
      [algorithm]
      name = "fedit"                     # see `fedlora algorithms`
    """,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(commands.site, name="site")
app.add_typer(commands.server, name="server")

RunFile = Annotated[Path, typer.Argument(metavar="FILE.toml", help="the run file")]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="a run folder")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="change one key")]


class Keyed(TyperCommand):
    """A command whose help ends with the keys of a run file; they are imported when they are asked for."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fedlora.study.keys import reference

        formatter.write(f"\n{reference()}\n")


@app.command(cls=Keyed)
def run(
    file: RunFile,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="the run folder to write (default: runs/...)")] = None,
) -> None:
    """Train a federation as FILE.toml says and write a run folder."""
    from fedlora.study.config import load
    from fedlora.study.run import run as start

    config = load(file, changes or [])
    result = start(config, out=out, name=file.stem, progress=True)
    _print_result(result)


@app.command()
def federate(
    file: RunFile,
    sites: Annotated[int, typer.Option(min=1, help="how many sites share the clients")] = 3,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="the run folder to write (default: runs/...)")] = None,
) -> None:
    """Train between processes of this machine, as sites would over a network: server, sites, and each its own data."""
    from fedlora.engines.flower.federate import federate as start
    from fedlora.study.config import load

    config = load(file, changes or [])
    _print_result(start(config, sites, out=out, name=file.stem, progress=True))


@app.command()
def resume(
    folder: RunFolder,
    rounds: Annotated[int | None, typer.Option(help="the new total number of rounds")] = None,
) -> None:
    """Go on with an interrupted run, or train a finished one for longer."""
    from fedlora.study.run import resume as go_on

    if (folder / "federation.json").exists():
        from fedlora.engines.flower.federate import resume as go_on
    _print_result(go_on(folder, rounds=rounds, progress=True))


@app.command()
def evaluate(
    folder: RunFolder,
    data: Annotated[Path, typer.Option(help="a file with the run's columns")],
    client: Annotated[str | None, typer.Option(help="score this client's model instead of the global one")] = None,
) -> None:
    """Score a run's global model, or one client's, on a file."""
    from fedlora.study.after import evaluate as score

    for name, value in score(folder, data, client=client).items():
        typer.echo(f"{name}: {value:.4f}")


@app.command()
def personalize(
    folder: RunFolder,
    data: Annotated[Path, typer.Option(help="the new client's examples, with the run's columns")],
    client: Annotated[str, typer.Option(help="its id")] = "new-client",
    model: Annotated[
        str | None, typer.Option(help="its own model, one of [clients] models (default: the first)")
    ] = None,
) -> None:
    """Serve a client that joins after training: its adapter is written into the run folder."""
    from fedlora.study.after import personalize as serve

    path, scores = serve(folder, data, client=client, backbone=model)
    for name, value in scores.items():
        typer.echo(f"{name}: {value:.4f}")
    typer.echo(f"wrote {path}")


@app.command()
def export(
    folder: RunFolder,
    to: Annotated[Path, typer.Option(help="the folder to write")],
    client: Annotated[str | None, typer.Option(help="the client (default: the global model)")] = None,
    merge: Annotated[bool, typer.Option(help="write the whole model with the adapter merged in")] = False,
) -> None:
    """Write an adapter that PEFT loads, or (--merge) a model that transformers loads."""
    from fedlora.study.export import export as write

    typer.echo(f"wrote {write(folder, to, client=client, merge=merge)}")


@app.command()
def predict(
    folder: RunFolder,
    text: Annotated[list[str], typer.Option(help="what to classify or continue; may be repeated")],
    client: Annotated[str | None, typer.Option(help="the client (default: the global model)")] = None,
) -> None:
    """Predict with a run's or an export's model."""
    from fedlora.study.predict import predict as answer

    for line in answer(folder, text, client=client):
        typer.echo(line)


@app.command()
def data(file: RunFile, changes: Changes = None) -> None:
    """Show clients, counts, labels and warnings; nothing is trained."""
    from fedlora.data.population import build
    from fedlora.data.preview import describe
    from fedlora.study.config import load

    config = load(file, changes or [])
    Console().print(describe(build(config.data, config.model.task)))


@app.command()
def algorithms() -> None:
    """List the algorithms and their parameters."""
    from fedlora.study.algorithm import catalogue

    Console().print(catalogue())


@app.command()
def compare(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="base, seeds, [grid], [tune]")],
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="the folder of the study (default: runs/compare-STUDY)")] = None,
) -> None:
    """Run a grid over seeds on identical splits and write table.md and table.csv; goes on where it stopped."""
    from fedlora.study.compare import compare as start
    from fedlora.study.compare import load_study

    out = out or Path("runs") / f"compare-{study.stem}"
    folder = start(load_study(study, changes or []), out, progress=True, say=typer.echo)
    typer.echo((folder / "table.md").read_text())
    typer.echo(f"wrote {folder / 'table.md'}, table.csv, runs.csv")


@app.command()
def quickstart(
    task: Annotated[str, typer.Option(help="causal-lm: code bases; text-classification: docstrings")] = "causal-lm",
    out: Annotated[Path | None, typer.Option(help="where to write (default: runs/quickstart)")] = None,
    seed: Annotated[int, typer.Option(help="the seed of split and training")] = 0,
) -> None:
    """A federation of code bases teaches a small model, each keeping its text to itself."""
    from fedlora.demos import DEMOS
    from fedlora.demos.demo import show

    if task not in DEMOS:
        raise UserError(f"--task {task!r}: there is no such demonstration", f"use one of {', '.join(DEMOS)}")
    show(DEMOS[task], out, seed=seed)


def _print_result(result: object) -> None:
    from fedlora.study.report import table

    Console().print(table(result))  # type: ignore[arg-type]


def main() -> None:
    """Entry point: mistakes of the user are one message and exit code 1; Ctrl-C says how to go on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no bars or umlauts shows question marks
            stream.reconfigure(errors="replace")
    try:
        app()
    except UserError as error:
        _fail(error)
    except Interrupted as stop:
        Console(stderr=True).print(f"\n{stop}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(130)
    except Exception as error:
        if (problem := refused(error)) is None:
            raise
        _fail(UserError(problem, "check the path, the rights there, and the room on its disk"))


def _fail(error: UserError) -> None:
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
