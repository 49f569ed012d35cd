"""What a user has given that is not used as it may be meant: shown before a run, and with its result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from fedlora.data.formats import Part
from fedlora.data.keys import listed
from fedlora.data.sources import SPLIT_NAMES, Split, split_of

_MANY = 30  # examples of a label, of which a fifth should be test examples: where none is, it is no chance
_SCALE = 20  # numbers with fractions, so many of them: fewer may be marks


def unheeded(part: Part, split: Split, used: Collection[str]) -> list[str]:
    """Of a file all of whose rows are taken for one split, though its column `split` says otherwise.

    used: the columns that are read.
    """
    if "split" in used or part.folder is None or "split" not in part.table.column_names:
        return []
    said = sorted({str(value) for value in part.table["split"].to_pylist() if value is not None})
    known = {name: SPLIT_NAMES[name.casefold()] for name in said if name.casefold() in SPLIT_NAMES}
    if len(said) < 2 or not set(known.values()) - {split}:  # rows that `FILE:NAME` took have one name
        return []
    remedy = ", ".join(f'{role} = "{part.name}:{name}"' for name, role in known.items())
    return [f"{part.name}: every row is taken as {split}, whatever its column 'split' says; to heed it: {remedy}"]


def unread(parts: Iterable[Part]) -> list[str]:
    """What lies in a folder that was given and no part has read, by folder."""
    parts = list(parts)
    taken = {place for part in parts for place in (Path(part.name), *Path(part.name).parents)}
    left: defaultdict[Path, dict[str, Path]] = defaultdict(dict)
    for part in parts:
        for path in part.unread:
            if path not in taken:
                left[path.parent][path.name] = path
    remarks: list[str] = []
    for folder, paths in left.items():
        splits = sorted({split for path in paths.values() if (split := split_of(path))})
        remedy = "; to read it: " + ", ".join(f'{split} = "{folder}"' for split in splits) if splits else ""
        remarks.append(f"folder {folder}: not read: {listed(list(paths))}{remedy}")
    return remarks


def quantities(labels: Sequence[str]) -> list[str]:
    """Of labels that are many numbers with fractions: what is measured, and no class.

    >>> quantities([str(i / 8) for i in range(160)])
    ["160 labels are numbers ('0.0', '0.125' and 158 more): each is a class of its own (make ranges of them classes)"]
    >>> quantities(["0.5", "1.0"]), quantities([str(i) for i in range(150)])
    ([], [])
    """
    try:
        fractions = any(float(label) % 1 for label in labels)
    except ValueError:
        return []
    if len(labels) < _SCALE or not fractions:
        return []
    of = f"{len(labels)} labels are numbers ({listed(list(labels), 2)})"
    return [f"{of}: each is a class of its own (make ranges of them classes)"]


def untested(code: np.ndarray, names: Sequence[str], tests: np.ndarray) -> list[str]:
    """Of labels that no test example has, though we had many of them to divide: their near-copies stay together.

    code, tests: (rows,) of the rows that we divided: the label as a place in `names`, and whether it is a test example.

    >>> untested(np.repeat([0, 1], 40), ["a", "b"], np.arange(80) < 20)
    ["no test example has 'b', of 30 and more: near-copies stay together (data.test may name others)"]
    """
    several = np.bincount(code, minlength=len(names)) >= _MANY
    found = several & (np.bincount(code[tests], minlength=len(names)) == 0)
    if not tests.any() or not found.any():
        return []
    of = listed([name for name, idle in zip(names, found, strict=True) if idle])
    return [f"no test example has {of}, of {_MANY} and more: near-copies stay together (data.test may name others)"]
