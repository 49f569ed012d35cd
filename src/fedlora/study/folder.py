"""The run folder: names, atomic writes, one owner at a time."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora.errors import UserError


def safe(name: str) -> str:
    """A name for a folder: the last part of a path, only letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rsplit("/", 1)[-1]).strip("-") or "run"


def fresh(wanted: str | Path | None, name: str) -> Path:
    """A new folder: the one wanted (which must be empty or absent), else runs/NAME, numbered where that exists."""
    if wanted is not None:
        folder = Path(wanted)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"--out {folder}: exists and is not empty", f"choose another, or go on with: fedlora resume {folder}"
            )
    else:
        folder = Path("runs") / name
        number = 2
        while folder.exists():
            folder = Path("runs") / f"{name}-{number}"
            number += 1
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def existing(folder: str | Path) -> Path:
    """A run folder that is there."""
    place = Path(folder)
    if not (place / "config.toml").exists():
        raise UserError(f"{place}: no run folder (it has no config.toml)", "give the folder that `fedlora run` printed")
    return place


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """One process at a time trains in a folder; its log lines go to run.log."""
    with (folder / "run.log").open("a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training there", "wait for it or stop it") from None
        handler = _Lines(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("fedlora")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)


class _Lines(logging.StreamHandler[Any]):
    """Lines that a full disk takes no more of: the run itself says so, once."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def discard_empty(folder: Path) -> None:
    """Removes a folder in which a run never began (only its log is there)."""
    if [path.name for path in folder.iterdir()] == ["run.log"]:
        (folder / "run.log").unlink()
        folder.rmdir()


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Adds one JSON line durably."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete JSON lines of a file; a last line cut off by a crash is left out."""
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                return


def forget_after(folder: Path, round: int) -> None:
    """Drops the metrics of rounds that a resumed run will do again, so that each round is there once."""
    kept = [line for line in lines(folder / "metrics.jsonl") if line["round"] <= round]
    replace(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    replace(path, json.dumps(value, indent=2) + "\n")


def replace(path: Path, text: str) -> None:
    """Writes a text file atomically: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Versions of what computes."""
    names = ("fedlora", "torch", "transformers", "peft", "datasets", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
