"""The first demonstration: code bases as clients teach a small language model code, and nobody's sources leave home.

Everything it does goes through ordinary run files, which it writes beside its results: they can be changed and run
again with ``fedlora run``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.data.packages import HELD_OUT, available, sources
from fedlora.demos.demo import POOLED, Demo, Plan, Row, row
from fedlora.errors import UserError

if TYPE_CHECKING:
    from fedlora.study.run import Result

CLIENTS = 10
TRAIN_BYTES, HELD_BYTES = 10_000, 3_000
SPLITS = ("test", "validation", "train")

LEAST = "4  "
"""What everybody can afford: the rank where all must have the same."""
PLANS = (
    Plan("alone", "local", 3, sends=False),
    Plan("fedit", "fedit", 4, "finetune_epochs = 1\n", ranks=LEAST),
    Plan("flexlora", "flexlora", 4, "finetune_epochs = 1\n"),
    Plan("fdlora", "fdlora", 4, "stage1_epochs = 1\ngenerations = 4\n", ranks=LEAST, needs="cma"),
    Plan("ce-lora", "ce-lora", 4, ranks=LEAST, needs="ot"),
    Plan(POOLED, "pooled", 3, batch_size=16, everyone=False, begin=True, sends=False),
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
    """At least three files, and half the characters that training asks for."""
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


def base(results: Mapping[str, Result]) -> Row:
    """The model before any training."""
    begin = results[POOLED].history[0]
    return row("base", begin["personal"], begin["global"], 0)


CODE = Demo(
    command="fedlora quickstart",
    what="a federation of code bases",
    model="embedded-lm",
    task="causal-lm",
    columns='text = "text"\n',
    sites="",
    rates="lr = 0.003\n",
    title="bits per byte on held-out source files",
    clients="each one code base",
    unit="own files",
    higher_is_better=False,
    prepare=write_data,
    plans=PLANS,
    first=base,
    rows=ROWS,
)
