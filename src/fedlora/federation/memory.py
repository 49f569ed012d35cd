"""A client's memory, versioned by round and keyed by run: in RAM, or in files that survive a kill at any moment."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from fedlora.errors import UserError
from fedlora.federation.wire import decode, encode


class Store(Protocol):
    """One client's memories. Only bytes are kept: nothing that was written or read is shared with anybody."""

    def read(self, run: str, version: int) -> Any:
        """The memory at the end of a round; a UserError names a version that is not there."""
        ...

    def write(self, run: str, version: int, memory: Any, keep: Collection[int | None]) -> None:
        """Adds a version, then drops this run's others except those in ``keep``: nobody can ask for them any more."""
        ...

    def flush(self) -> None:
        """Makes what was written durable; before a server checkpoint that would ask for it is saved."""
        ...


def quoted(name: str) -> str:
    """A file name for any text, percent-encoded; too long ones end in a digest.

    >>> quoted("St. Mary's/2"), quoted(".."), quoted("ward 7")
    ('St.%20Mary%27s%2F2', '%2E.', 'ward%207')
    """
    text = quote(name, safe="") or "%"
    text = "%2E" + text[1:] if text.startswith(".") else text
    if len(text) > 180:
        text = f"{text[:150].rstrip('%')}%-{hashlib.sha256(name.encode()).hexdigest()[:24]}"
    return text


def missing(client: str, run: str, version: int, have: list[int]) -> UserError:
    """The error for a version that is not there."""
    return UserError(
        f"client {client!r} has no memory of round {version} of run {run!r}, only of rounds {have}",
        "resume from the server checkpoint that belongs to these memories, or start the run anew",
    )


class RamMemory:
    """Memory for a process that may lose it.

    >>> store = RamMemory("a")
    >>> store.write("run", 1, {"count": 1}, keep=())
    >>> store.read("run", 1)
    {'count': 1}
    """

    def __init__(self, client: str) -> None:
        self.client = client
        self.versions: dict[tuple[str, int], bytes] = {}

    def read(self, run: str, version: int) -> Any:
        if (run, version) not in self.versions:
            raise missing(self.client, run, version, sorted(v for r, v in self.versions if r == run))
        return decode(self.versions[run, version])

    def write(self, run: str, version: int, memory: Any, keep: Collection[int | None]) -> None:
        self.versions[run, version] = encode(memory)
        for key in [key for key in self.versions if key[0] == run and key[1] != version and key[1] not in keep]:
            del self.versions[key]

    def flush(self) -> None:
        """Nothing to do."""


class DiskMemory:
    """Memory in ``folder/<run>/<client>/<version>.safetensors``, names percent-encoded.

    A version appears by renaming, so a kill leaves it whole or absent; what a kill left over is removed by the next
    write. ``flush`` makes it outlive a power cut as well.
    """

    def __init__(self, folder: Path | str, client: str) -> None:
        self.folder = Path(folder)
        self.client = client
        self.fresh: set[Path] = set()

    def path(self, run: str, version: int) -> Path:
        """Where a version lies."""
        return self.folder / quoted(run) / quoted(self.client) / f"{version}.safetensors"

    def versions(self, run: str) -> list[int]:
        """The versions that are there."""
        names = (path.stem for path in self.path(run, 0).parent.glob("*.safetensors"))
        return sorted(int(name) for name in names if name.lstrip("-").isdigit())

    def read(self, run: str, version: int) -> Any:
        path = self.path(run, version)
        try:
            return decode(path.read_bytes())
        except FileNotFoundError:
            raise missing(self.client, run, version, self.versions(run)) from None
        except ValueError as problem:
            raise UserError(f"{path}: the memory of client {self.client!r} is damaged ({problem})") from problem

    def write(self, run: str, version: int, memory: Any, keep: Collection[int | None]) -> None:
        path = self.path(run, version)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{version}-{secrets.token_hex(4)}.tmp")  # nobody else's, should two write at a time
        temporary.write_bytes(encode(memory))
        os.replace(temporary, path)
        self.fresh.add(path)
        kept = {f"{number}.safetensors" for number in {version, *keep}}
        for other in list(path.parent.iterdir()):
            if other.name not in kept:
                other.unlink()
                self.fresh.discard(other)

    def flush(self) -> None:
        for path in sorted(self.fresh):
            sync(path)
        for folder in sorted({path.parent for path in self.fresh}):
            sync(folder)
        self.fresh.clear()


def sync(path: Path) -> None:
    """fsync of a file, or of a folder where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # folders on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
