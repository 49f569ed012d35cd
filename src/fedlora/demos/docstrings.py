"""The second demonstration: what a docstring's first verb was, for a sentence encoder; packages are the clients.

Why this label: the adapter must matter. Which topic a docstring is about, a linear head on the frozen encoder tells as
well as a tuned one; which verb was removed from its summary, it does not (``studies/README.md`` has the numbers, of
other labels too). And packages differ in what their functions do.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlora.data.duplicates import near_copies
from fedlora.data.packages import available, docstrings_of, sources
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
CLIENTS = 10
SIZES = {"test": 40, "validation": 24, "train": 96}
"""Examples of a client, taken in this order."""
PER_FILE = 24
"""At most: a client is more than its longest file."""
VERBS: Mapping[str, str] = {
    **{verb: verb for verb in ("return", "get", "set", "add", "remove", "find", "apply", "run", "read", "write")},
    **dict.fromkeys(("compute", "calculate", "evaluate"), "compute"),
    **dict.fromkeys(("create", "construct", "build", "make", "generate"), "create"),
    **dict.fromkeys(("check", "validate", "verify", "test"), "check"),
    **dict.fromkeys(("convert", "transform", "cast"), "convert"),
}
"""A summary's first word -> the label: verbs of one meaning are one."""

PRIVATE = 'extras = { head = "private" }\n'
LEAST = "4  "
"""What everybody can afford: the rank where all must have the same."""
PLANS = (
    Plan("head-alone", "head-only", 3, adapter=PRIVATE, ranks=LEAST, sends=False),
    Plan("alone", "local", 3, sends=False),
    Plan("fedit", "fedit", 4, "finetune_epochs = 1\n", ranks=LEAST),
    Plan("flexlora", "flexlora", 4, "finetune_epochs = 1\n"),
    Plan("fdlora", "fdlora", 3, "stage1_epochs = 1\ngenerations = 4\n", ranks=LEAST, needs="cma"),
    Plan("ce-lora", "ce-lora", 4, ranks=LEAST, needs="ot"),
    Plan("pooled-head", "pooled", 3, "adapter = false\n", batch_size=16, everyone=False, sends=False),
    Plan(POOLED, "pooled", 3, batch_size=16, everyone=False, sends=False),
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
    """Each client's examples, split by file, as train, validation and test JSONL; the clients' names.

    No two examples of anybody are near-copies, and none is held out whose verb nobody trains on.
    """
    folder.mkdir(parents=True)
    names: list[str] = []
    rows: list[dict[str, str]] = []
    for name in available(PACKAGES):
        found = examples(name, seed)
        if len(found) >= sum(SIZES.values()) // 2:
            names.append(name)
            rows += [{"client": name, "file": path, "text": text, "label": label} for path, text, label in found]
        if len(names) == CLIENTS:
            break
    if len(names) < 2:
        raise UserError(
            "the demonstration needs at least two packages with docstrings that are installed",
            f"install some of {', '.join(PACKAGES)}",
        )
    _, first = np.unique(near_copies(row["text"] for row in rows), return_index=True)
    kept = [rows[i] for i in sorted(first)]
    parts = [split_by_file([row for row in kept if row["client"] == name]) for name in names]
    taught = {row["label"] for part in parts for row in part["train"]}
    for split in SIZES:
        lines = [json.dumps(row) + "\n" for part in parts for row in part[split] if row["label"] in taught]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return names


def examples(package: str, seed: int) -> list[tuple[str, str, str]]:
    """A package's files in random order: their paths, summaries without the verb, and the verb."""
    files = sources(package)
    random.Random(f"{seed}/{package}").shuffle(files)
    found: list[tuple[str, str, str]] = []
    for path, source in files:
        own = [example for text in summaries(source) if (example := divided(text)) is not None]
        found += [(path, *example) for example in own[:PER_FILE]]
        if len(found) >= 1.25 * sum(SIZES.values()):  # near-copies will be left out
            break
    return found


def split_by_file(rows: Sequence[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    """A client's rows in file order as test, validation and train, each up to its size; no file is in two parts."""
    parts: dict[str, list[Mapping[str, str]]] = {split: [] for split in SIZES}
    waiting = list(SIZES)
    for _, own in groupby(rows, key=lambda row: row["file"]):
        if len(parts[waiting[0]]) >= SIZES[waiting[0]]:
            waiting.pop(0)
        if not waiting:
            break
        room = SIZES[waiting[0]] - len(parts[waiting[0]])
        parts[waiting[0]] += list(own)[:room]
    return parts


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


def summaries(source: str) -> list[str]:
    """The first paragraph of every docstring, on one line."""
    return [re.sub(r"\s+", " ", text.partition("\n\n")[0]) for text in docstrings_of(source)]


def prior(results: Mapping[str, Result]) -> Row:
    """Each client's most frequent verb, whatever the text."""
    scores = results[POOLED].summary["class_prior"]
    return Row("class prior", scores["mean"], scores["std"], scores["worst_decile"], None, 0)


DOCSTRINGS = Demo(
    command="fedlora quickstart --task text-classification",
    what="a federation of packages",
    model="minilm",
    task="text-classification",
    columns='text = "text"\nlabel = "label"\nmax_length = 32\n',
    sites='targets = ["query", "value"]\nlayers = [3, 4, 5]\n',
    rates="lr = 0.002\nhead_lr = 0.01\n",
    title="accuracy on held-out docstrings: which verb was removed",
    clients="each the docstrings of one package",
    unit="own",
    higher_is_better=True,
    prepare=write_data,
    plans=PLANS,
    first=prior,
    rows=ROWS,
)
