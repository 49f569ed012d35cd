"""The quickstart: code bases as clients teach a small language model code, and nobody's sources leave home.

Everything it does goes through ordinary run files, which it writes beside its results: they can be changed and run
again with ``fedlora run``.
"""

from __future__ import annotations

import importlib.util
import io
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fedlora.data.packages import HELD_OUT, available, sources
from fedlora.errors import UserError
from fedlora.study.folder import fresh, write_json
from fedlora.study.report import megabytes, number

if TYPE_CHECKING:
    from fedlora.study.run import Result

CLIENTS = 10
TRAIN_BYTES, HELD_BYTES = 10_000, 3_000
SPLITS = ("test", "validation", "train")

RUN_FILE = """\
# Written by `fedlora quickstart`: a federation of code bases. Change anything and run it again: fedlora run {file}
seed = {seed}

[model]
name = "embedded-lm"          # a hub id or a folder of your own model
task = "causal-lm"
dtype = "{dtype}"

[data]
train = "data/train.jsonl"    # your own file: one JSON object a line
validation = "data/validation.jsonl"
test = "data/test.jsonl"
text = "text"
partition = {{ by = "column", column = "client" }}

[adapter]
rank = 16

[clients]
ranks = {ranks}            # what each client can afford, in turn

[algorithm]
name = "{algorithm}"
{parameters}
[training]
rounds = {rounds}
epochs = 1
batch_size = {batch_size}
lr = 0.003
eval_every = {every}                # rounds between scores; 0: only at the end
eval_everyone = {everyone}

[output]
client_adapters = "all"
"""


@dataclass(frozen=True)
class Row:
    """One line of the result: bits per byte on each client's own files and on everybody's, bytes sent."""

    name: str
    mean: float | None
    std: float | None
    worst_decile: float | None
    everyone: float | None
    sent: int


@dataclass(frozen=True)
class Plan:
    """A run of the quickstart: what its file says. ``needs``: a module that comes with an extra."""

    file: str
    algorithm: str
    rounds: int
    parameters: str = ""
    ranks: str = "[4, 8, 16]"
    batch_size: int = 8
    everyone: bool = True
    begin: bool = False  # score the start too
    needs: str | None = None


LEAST = "4  "
"""What everybody can afford: the rank where all must have the same."""
PLANS = (
    Plan("alone", "local", 3),
    Plan("fedit", "fedit", 4, "finetune_epochs = 1\n", LEAST),
    Plan("flexlora", "flexlora", 4, "finetune_epochs = 1\n"),
    Plan("fdlora", "fdlora", 4, "stage1_epochs = 1\ngenerations = 4\n", LEAST, needs="cma"),
    Plan("ce-lora", "ce-lora", 4, "", LEAST, needs="ot"),
    Plan("pooled", "pooled", 3, batch_size=16, everyone=False, begin=True),
)
ROWS = (
    ("each alone", "alone", True),
    ("FedIT", "fedit", False),
    ("FedIT + one local epoch", "fedit", True),
    ("FlexLoRA", "flexlora", False),
    ("FlexLoRA + one local epoch", "flexlora", True),
    ("FDLoRA", "fdlora", True),
    ("CE-LoRA", "ce-lora", True),
)
"""The table's lines between the base and all data pooled: their name, their run, and whether the model is the one that
a client deploys (else the server's)."""


def quickstart(
    out: Path | None = None, *, seed: int = 0, console: Console | None = None, plans: Sequence[Plan] = PLANS
) -> Group:
    """Writes data and run files, runs them, and prints one table; all lands in ``out``."""
    from fedlora.study.config import load
    from fedlora.study.run import run

    console = console or Console()
    start = time.perf_counter()
    out = fresh(out, "quickstart")
    names = write_data(out / "data", seed)
    console.print(f"{len(names)} clients, each one code base: {', '.join(names)}")
    results: dict[str, Result] = {}
    dtype = "auto"
    plans = [plan for plan in plans if plan.needs is None or importlib.util.find_spec(plan.needs)]
    for plan in plans:
        file = out / f"{plan.file}.toml"
        file.write_text(text_of(plan, seed, file, dtype))
        console.print(f"fedlora run {file}", highlight=False)
        results[plan.file] = run(load(file), out=out / plan.file, progress=True)
        dtype = load(out / plan.file / "config.toml").model.dtype  # measured once, the same for all
    rows = rows_of(results)
    shown = picture(rows, len(names), time.perf_counter() - start)
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


def text_of(plan: Plan, seed: int, file: Path, dtype: str) -> str:
    """The run file of a plan."""
    return RUN_FILE.format(
        file=file,
        seed=seed,
        dtype=dtype,
        everyone=str(plan.everyone).lower(),
        algorithm=plan.algorithm,
        parameters=plan.parameters,
        ranks=plan.ranks,
        rounds=plan.rounds,
        every=plan.rounds if plan.begin else 0,
        batch_size=plan.batch_size,
    )


def write_data(folder: Path, seed: int) -> list[str]:
    """Each client's files, split by file, into train, validation and test JSONL; the clients' names."""
    folder.mkdir(parents=True)
    names = [name for name in available(HELD_OUT) if enough(sources(name))][:CLIENTS]
    if len(names) < 2:
        raise UserError(
            "the quickstart needs at least two code bases that are installed",
            f"install some of {', '.join(HELD_OUT)}",
        )
    examples = {split: [] for split in SPLITS}
    for name in names:
        for split, files in divided(sources(name), name, seed).items():
            examples[split] += [{"client": name, "file": path, "text": text} for path, text in files]
    for split, rows in examples.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return names


def enough(files: Sequence[tuple[str, str]]) -> bool:
    """At least three files, and the bytes that training and both held-out parts ask for."""
    return len(files) >= 3 and sum(len(text) for _, text in files) >= TRAIN_BYTES // 2


def divided(files: Sequence[tuple[str, str]], name: str, seed: int) -> dict[str, list[tuple[str, str]]]:
    """A client's files in random order: test and validation first, then training, each up to its size in bytes.

    No file is in two parts; the last file of a part is cut to the size.
    """
    order = list(files)
    random.Random(f"{seed}/{name}").shuffle(order)
    parts: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for position, (split, size) in enumerate(zip(SPLITS, (HELD_BYTES, HELD_BYTES, TRAIN_BYTES), strict=True)):
        room = size
        while room > 0 and len(order) > len(SPLITS) - 1 - position:
            path, text = order.pop()
            parts[split].append((path, text[:room]))
            room -= len(text)
    return parts


def rows_of(results: Mapping[str, Result]) -> list[Row]:
    """The table's rows from the runs; the base is what is scored before any training."""
    pooled = results["pooled"]
    begin, end = pooled.history[0], pooled.summary
    rows = [_row("base", begin["personal"], begin["global"], 0)]
    for name, run, deployed in ROWS:
        if run not in results:
            continue
        summary = results[run].summary
        personal = summary["personal"]
        sent = 0 if run == "alone" else sum(summary["bytes"].values())  # its frames are empty
        if deployed:
            rows.append(_row(name, personal, personal["on_everyone"]["mean"], sent))
        else:
            rows.append(_row(name, personal["variants"]["global"], summary["global"]["score"], sent))
    return [*rows, _row("all data pooled (not federated)", end["personal"], end["global"]["score"], 0)]


def _row(name: str, scores: Mapping[str, Any], everyone: float | None, sent: int) -> Row:
    return Row(name, scores["mean"], scores["std"], scores["worst_decile"], everyone, sent)


def picture(rows: Sequence[Row], clients: int, seconds: float) -> Group:
    """The result: a table with bars of what was gained on the base."""
    table = Table(title="bits per byte on held-out source files (lower is better)", title_justify="left")
    for heading in ("", "own files", "std", "worst tenth", "everyone's", "sent"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(
            row.name,
            number(row.mean),
            number(row.std),
            number(row.worst_decile),
            number(row.everyone),
            megabytes(row.sent) if row.sent else "-",
        )
    base = rows[0].mean or 0.0
    best = max(base - (row.mean or base) for row in rows)
    bars = [Text("gain over the base, bits per byte")]
    for row in rows[1:]:
        gain = base - (row.mean or base)
        bars.append(Text(f"  {row.name:<32} {'█' * round(40 * max(gain, 0) / best) if best > 0 else ''} {gain:+.4f}"))
    return Group(table, *bars, Text(f"{clients} clients, {seconds:.0f} s"))
