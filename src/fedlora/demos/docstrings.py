"""The second demonstration: what a docstring's first verb was, for a sentence encoder; packages are the clients.

Why this label: the adapter must matter. Which package or topic a docstring is from, a linear head on the frozen encoder
tells as well as a tuned one; which verb was removed from its summary, it does not (``studies/README.md`` has the
numbers). And packages differ in what their functions do.
"""

from __future__ import annotations

import ast
import json
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.data.packages import available, prose, sources
from fedlora.demos.demo import POOLED, Demo, Plan, Row
from fedlora.errors import UserError

if TYPE_CHECKING:
    from fedlora.study.run import Result

PACKAGES = (
    "torch.nn",
    "torch.distributed",
    "transformers",
    "numpy",
    "scipy",
    "sklearn",
    "pandas.core",
    "networkx",
    "sympy",
    "huggingface_hub",
    "datasets",
    "peft",
    "pydantic",
    "aiohttp",
    "rich",
)
CLIENTS, EXAMPLES = 12, 240
VERBS: Mapping[str, str] = {
    **{verb: verb for verb in ("return", "get", "set", "add", "remove", "find", "apply", "run", "read", "write")},
    **dict.fromkeys(("compute", "calculate", "evaluate"), "compute"),
    **dict.fromkeys(("create", "construct", "build", "make", "generate"), "create"),
    **dict.fromkeys(("check", "validate", "verify", "test"), "check"),
    **dict.fromkeys(("convert", "transform", "cast"), "convert"),
}
"""A summary's first word -> the label: verbs of one meaning are one."""

RUN_FILE = """\
# Written by `fedlora quickstart --task text-classification`. Change anything and run it again: fedlora run {file}
seed = {seed}

[model]
name = "minilm"               # a hub id or a folder of your own model
task = "text-classification"
dtype = "{dtype}"

[data]
train = "data/docstrings.jsonl"   # your own file: one JSON object a line
text = "text"
label = "label"
max_length = 48
partition = {{ by = "column", column = "client" }}

[adapter]
rank = 16
{adapter}
[clients]
ranks = {ranks}            # what each client can afford, in turn

[algorithm]
name = "{algorithm}"
{parameters}
[training]
rounds = {rounds}
epochs = 1
batch_size = {batch_size}
lr = 0.002
head_lr = 0.01
eval_every = 0                # rounds between scores; 0: only at the end
eval_everyone = {everyone}
"""
PRIVATE = 'extras = { head = "private" }\n'
LEAST = "4  "
"""What everybody can afford: the rank where all must have the same."""
PLANS = (
    Plan("head-alone", "head-only", 4, adapter=PRIVATE, ranks=LEAST),
    Plan("alone", "local", 4),
    Plan("fedit", "fedit", 4, "finetune_epochs = 1\n", ranks=LEAST),
    Plan("flexlora", "flexlora", 4, "finetune_epochs = 1\n"),
    Plan("fdlora", "fdlora", 3, "stage1_epochs = 1\ngenerations = 4\n", ranks=LEAST, needs="cma"),
    Plan("ce-lora", "ce-lora", 4, ranks=LEAST, needs="ot"),
    Plan("pooled-head", "pooled", 4, "adapter = false\n", batch_size=16),
    Plan(POOLED, "pooled", 4, batch_size=16),
)
ROWS = (
    ("frozen encoder, a head each", "head-alone", True),
    ("each alone", "alone", True),
    ("FedIT", "fedit", False),
    ("FedIT + one local epoch", "fedit", True),
    ("FlexLoRA", "flexlora", False),
    ("FlexLoRA + one local epoch", "flexlora", True),
    ("FDLoRA", "fdlora", True),
    ("CE-LoRA", "ce-lora", True),
    ("pooled, frozen encoder", "pooled-head", False),
)


def write_data(folder: Path, seed: int) -> list[str]:
    """One JSONL file of every client's docstrings; the clients' names."""
    folder.mkdir(parents=True)
    found = {name: examples(name, seed) for name in available(PACKAGES)}
    names = [name for name, rows in found.items() if len(rows) >= EXAMPLES // 2][:CLIENTS]
    if len(names) < 2:
        raise UserError(
            "the demonstration needs at least two packages with docstrings that are installed",
            f"install some of {', '.join(PACKAGES)}",
        )
    rows = [{"client": name, "text": text, "label": label} for name in names for text, label in found[name]]
    (folder / "docstrings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return names


def examples(package: str, seed: int) -> list[tuple[str, str]]:
    """Up to ``EXAMPLES`` summaries without their verb, and the verb, from a package's files in random order."""
    files = sources(package)
    random.Random(f"{seed}/{package}").shuffle(files)
    found: list[tuple[str, str]] = []
    for _, source in files:
        found += [example for text in summaries(source) if (example := divided(text)) is not None]
        if len(found) >= EXAMPLES:
            break
    return found[:EXAMPLES]


def divided(summary: str) -> tuple[str, str] | None:
    """A summary without its first word and what the word stands for; None where that is none of the verbs.

    >>> divided("Returns the number of edges between two nodes.")
    ('the number of edges between two nodes.', 'return')
    """
    first, _, rest = summary.partition(" ")
    word = first.lower()
    for verb in (word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y"):
        if verb in VERBS and len(rest) >= 15:
            return rest, VERBS[verb]
    return None


def summaries(source: str) -> Iterator[str]:
    """The first paragraph of every function's docstring, on one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\\d" in other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
            yield re.sub(r"\s+", " ", prose(doc).partition("\n\n")[0]).strip()


def prior(results: Mapping[str, Result]) -> Row:
    """Each client's most frequent verb, whatever the text."""
    scores = results[POOLED].summary["class_prior"]
    return Row("class prior", scores["mean"], scores["std"], scores["worst_decile"], None, 0)


DOCSTRINGS = Demo(
    title="accuracy on held-out docstrings: which verb was removed",
    clients="each the docstrings of one package",
    unit="own",
    higher_is_better=True,
    prepare=write_data,
    run_file=RUN_FILE,
    plans=PLANS,
    first=prior,
    rows=ROWS,
)
