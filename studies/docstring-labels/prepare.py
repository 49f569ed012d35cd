"""Docstrings of installed packages under several labels, split by file: python studies/docstring-labels/prepare.py

Writes runs/docstring-labels/data.jsonl: functions whose summary begins with a verb, one a line.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedlora.data.duplicates import near_copies
from fedlora.data.packages import available, prose, sources
from fedlora.demos.docstrings import PACKAGES, divided

OUT = Path("runs/docstring-labels/data.jsonl")
FILES, PER_FILE, MOST = 100, 24, 2400
"""Files of a package, summaries of a file, of all."""


def functions(source: str) -> Iterator[dict[str, str]]:
    """Of each function: its summary, the summary without its verb, the verb, its kind, whether it returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\\d" in other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return
    methods = {part for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for part in node.body}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = " ".join(prose(ast.get_docstring(node) or "").partition("\n\n")[0].split())
        if (found := divided(text)) is None:
            continue
        property_ = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        returns = any(isinstance(part, ast.Return) and part.value is not None for part in ast.walk(node))
        kind = "property" if property_ else "method" if node in methods else "function"
        yield {"text": text, "rest": found[0], "verb": found[1], "kind": kind, "returns": str(returns)}


def split_of(package: str, path: str) -> str:
    """A file is in one split: 70 % train, 10 % validation, 20 % test."""
    place = hashlib.sha256(f"{package}/{path}".encode()).digest()[0]
    return "test" if place < 51 else "validation" if place < 77 else "train"


def main() -> None:
    rows: list[dict[str, str]] = []
    for package in available(PACKAGES):
        files = sources(package)
        random.Random(package).shuffle(files)
        for path, source in files[:FILES]:
            about = {"package": package, "split": split_of(package, path)}
            rows += [{**about, **row} for row in list(functions(source))[:PER_FILE]]
    _, first = np.unique(near_copies(row["rest"] for row in rows), return_index=True)
    kept = [rows[i] for i in first]
    random.Random(0).shuffle(kept)
    kept = kept[:MOST]
    taught = {row["verb"] for row in kept if row["split"] == "train"}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("".join(json.dumps(row) + "\n" for row in kept if row["verb"] in taught))
    print(f"wrote {OUT}: {len(kept)} of {len(rows)} summaries")


if __name__ == "__main__":
    main()
