"""A demonstration: its data, the run files that it writes, and the rows of its one table."""

from __future__ import annotations

import importlib.util
import io
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fedlora.study.folder import fresh, write_json
from fedlora.study.report import megabytes, number

if TYPE_CHECKING:
    from fedlora.study.run import Result

RUN_FILE = """\
# Written by `{command}`: {what}. Change anything and run it again: fedlora run {file}
seed = {seed}

[model]
name = "{model}"          # a hub id or a folder of your own model
task = "{task}"
dtype = "{dtype}"

[data]
train = "data/train.jsonl"    # your own file: one JSON object a line
validation = "data/validation.jsonl"
test = "data/test.jsonl"
{columns}partition = {{ by = "column", column = "client" }}

[adapter]
rank = 16
{sites}{adapter}
[clients]
ranks = {ranks}            # what each client can afford, in turn

[algorithm]
name = "{algorithm}"
{parameters}
[training]
rounds = {rounds}
epochs = 1
batch_size = {batch_size}
{rates}eval_every = {every}                # rounds between scores; 0: only at the end
eval_everyone = {everyone}

[output]
client_adapters = "all"
"""
POOLED = "pooled"
"""The file of the plan that is no federation."""


@dataclass(frozen=True)
class Row:
    """One line of the result: scores on each client's own data and on everybody's, bytes sent."""

    name: str
    mean: float | None
    std: float | None
    worst_decile: float | None
    everyone: float | None
    sent: int


@dataclass(frozen=True)
class Plan:
    """A run: what its file says. ``parameters``, ``adapter``: further lines of these sections; ``begin``: score the
    start too; ``sends``: something travels (a frame of nothing has bytes too); ``needs``: a module that comes with an
    extra."""

    file: str
    algorithm: str
    rounds: int
    parameters: str = ""
    adapter: str = ""
    ranks: str = "[4, 8, 16]"
    batch_size: int = 8
    everyone: bool = True
    begin: bool = False
    sends: bool = True
    needs: str | None = None


@dataclass(frozen=True)
class Demo:
    """``what`` it is, in a few words; ``columns``, ``sites``, ``rates``: lines of ``[data]``, ``[adapter]`` and
    ``[training]``; ``prepare(folder, seed)`` writes data and names the clients; ``first`` is the row that others are
    measured by; ``rows`` are the lines between it and the pooled data: their name, their run, and whether the model is
    the one that a client deploys (else the server's)."""

    command: str
    what: str
    model: str
    task: str
    columns: str
    sites: str
    rates: str
    title: str
    clients: str
    unit: str
    higher_is_better: bool
    prepare: Callable[[Path, int], list[str]]
    plans: Sequence[Plan]
    first: Callable[[Mapping[str, Result]], Row]
    rows: Sequence[tuple[str, str, bool]]

    def text_of(self, plan: Plan, seed: int, file: Path, dtype: str) -> str:
        """The run file of a plan."""
        every = plan.rounds if plan.begin else 0
        settled = {"file": file, "seed": seed, "dtype": dtype, "every": every, "everyone": str(plan.everyone).lower()}
        return RUN_FILE.format(**{**vars(self), **vars(plan), **settled})


def show(demo: Demo, out: Path | None = None, *, seed: int = 0, console: Console | None = None) -> Group:
    """Writes data and run files, runs them, and prints one table; all lands in ``out``."""
    from fedlora.study.config import load
    from fedlora.study.run import run

    console = console or Console()
    start = time.perf_counter()
    out = fresh(out, "quickstart")
    names = demo.prepare(out / "data", seed)
    console.print(f"{len(names)} clients, {demo.clients}: {', '.join(names)}")
    results: dict[str, Result] = {}
    dtype = "auto"
    plans = [plan for plan in demo.plans if plan.needs is None or importlib.util.find_spec(plan.needs)]
    for plan in plans:
        file = out / f"{plan.file}.toml"
        file.write_text(demo.text_of(plan, seed, file, dtype))
        console.print(f"fedlora run {file}", highlight=False)
        results[plan.file] = run(load(file), out=out / plan.file, progress=True)
        dtype = load(out / plan.file / "config.toml").model.dtype  # measured once, the same for all
    rows = rows_of(demo, results)
    shown = picture(demo, rows, len(names), time.perf_counter() - start)
    console.print(shown)
    write_json(out / "table.json", {"seed": seed, "clients": names, "rows": [vars(row) for row in rows]})
    paper = Console(record=True, width=100, file=io.StringIO())
    paper.print(shown)
    picture_file = paper.export_svg(title="fedlora quickstart")
    fonts = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # they would be fetched from the web: any monospace will do
    (out / "table.svg").write_text(fonts.sub("", picture_file))
    for path in (out / "table.svg", out / "table.json", *(out / plan.file for plan in plans)):
        console.print(f"wrote {path}", highlight=False)
    return shown


def rows_of(demo: Demo, results: Mapping[str, Result]) -> list[Row]:
    """The table's rows from the runs."""
    rows, silent = [demo.first(results)], {plan.file for plan in demo.plans if not plan.sends}
    for name, run, deployed in demo.rows:
        if run not in results:
            continue
        summary = results[run].summary
        personal = summary["personal"]
        sent = 0 if run in silent else sum(summary["bytes"].values())
        if deployed:
            rows.append(row(name, personal, personal["on_everyone"]["mean"], sent))
        else:
            rows.append(row(name, personal["variants"]["global"], summary["global"]["score"], sent))
    end = results[POOLED].summary
    return [*rows, row("all data pooled (not federated)", end["personal"], end["global"]["score"], 0)]


def row(name: str, scores: Mapping[str, Any], everyone: float | None, sent: int) -> Row:
    """A line from a summary's scores."""
    return Row(name, scores["mean"], scores["std"], scores["worst_decile"], everyone, sent)


def picture(demo: Demo, rows: Sequence[Row], clients: int, seconds: float) -> Group:
    """The result: a table with bars of what was gained on its first row."""
    arrow = "higher" if demo.higher_is_better else "lower"
    table = Table(title=f"{demo.title} ({arrow} is better)", title_justify="left")
    for heading in ("", demo.unit, "std", "worst tenth", "everyone's", "sent"):
        table.add_column(heading, justify="right" if heading else "left")
    for one in rows:
        scores = (number(value) for value in (one.mean, one.std, one.worst_decile, one.everyone))
        table.add_row(one.name, *scores, megabytes(one.sent) if one.sent else "-")
    base, sign = rows[0].mean or 0.0, 1 if demo.higher_is_better else -1
    gains = [sign * ((one.mean or base) - base) for one in rows[1:]]
    bars = [Text(f"gain over the {rows[0].name}, {demo.title.partition(' on ')[0]}")]
    for one, gain in zip(rows[1:], gains, strict=True):
        bar = "█" * round(40 * max(gain, 0) / max(gains)) if max(gains) > 0 else ""
        bars.append(Text(f"  {one.name:<32} {bar} {gain:+.4f}"))
    return Group(table, *bars, Text(f"{clients} clients, {seconds:.0f} s"))
