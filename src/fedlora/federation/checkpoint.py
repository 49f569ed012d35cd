"""Server checkpoints that are whole or absent, whatever moment a kill chooses.

``<round>-<digest>.safetensors`` is written under a temporary name, synced and renamed; ``<round>.json``, the manifest
with its SHA-256, comes last in the same way. The last two are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedlora.errors import UserError
from fedlora.federation.memory import sync
from fedlora.federation.wire import decode, encode

KEPT = 2
NOTHING: Mapping[str, Any] = MappingProxyType({})


def save(folder: Path | str, checkpoint: Mapping[str, Any], extra: Mapping[str, Any] = NOTHING) -> Path:
    """Saves a report's checkpoint, with ``extra`` plain values beside its own names; the manifest's path.

    When this returns the checkpoint is durable: flush client memories before, call ``report.saved()`` after.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frame = encode({**checkpoint, **extra})
    digest = hashlib.sha256(frame).hexdigest()
    name = f"{int(checkpoint['round']):08d}"
    data = folder / f"{name}-{digest[:16]}.safetensors"
    _place(data, frame)
    manifest = folder / f"{name}.json"
    _place(manifest, json.dumps({"round": checkpoint["round"], "file": data.name, "sha256": digest}).encode() + b"\n")
    _tidy(folder)
    return manifest


def latest(folder: Path | str) -> dict[str, Any] | None:
    """The newest whole checkpoint; None where there never was one. A UserError where all are damaged."""
    manifests = sorted(Path(folder).glob("*.json"), reverse=True)
    for path in manifests:
        manifest = _read(path)
        if manifest is not None:
            frame = (path.parent / manifest["file"]).read_bytes()
            if hashlib.sha256(frame).hexdigest() == manifest["sha256"]:
                return decode(frame)
    if manifests:
        raise UserError(f"{folder}: every checkpoint is damaged", "start the run anew in another folder")
    return None


def _read(path: Path) -> dict[str, str] | None:
    """A manifest whose file is there."""
    try:
        manifest = json.loads(path.read_bytes())
        return manifest if (path.parent / manifest["file"]).is_file() and manifest["sha256"] else None
    except (ValueError, KeyError, TypeError):
        return None


def _place(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def _tidy(folder: Path) -> None:
    """Removes all but the last readable manifests, then what no manifest names."""
    named: set[str] = set()
    for path in sorted(folder.glob("*.json"), reverse=True):
        manifest = _read(path)
        if manifest is None or len(named) == KEPT:
            path.unlink()
        else:
            named.add(manifest["file"])
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.tmp")]:
        if path.name not in named:
            path.unlink()
