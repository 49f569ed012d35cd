"""Frames as Flower's records and back: bytes in chunks beside a header of plain text and numbers.

Imported for every message at a site, so it needs nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

CHUNK = 4 << 20
FORMAT = 1
HEADER, BODY = "fedlora", "frame"


class Malformed(ValueError):
    """A record that this engine did not write."""


@dataclass(frozen=True)
class Header:
    """What is said outside the frame. ``nonce``: of the question; an answer repeats it. ``seconds``: after which nobody
    waits for the answer any more. ``run``: the run's id; ``round``: of the question."""

    nonce: str
    kind: str
    run: str
    round: int
    seconds: float = 0.0


def pack(header: Header, frame: bytes) -> RecordDict:
    """A frame as records."""
    view = memoryview(frame)
    parts = [bytes(view[start : start + CHUNK]) for start in range(0, len(frame), CHUNK)]
    chunks = {f"{i:06d}": Array("uint8", (len(part),), "bytes", part) for i, part in enumerate(parts)}
    said = {"format": FORMAT, "size": len(frame), **vars(header)}
    return RecordDict({HEADER: ConfigRecord(said), BODY: ArrayRecord(chunks)})


def header_of(content: RecordDict) -> Header:
    """The header of a record; Malformed where it is not ours."""
    found = content.config_records.get(HEADER)
    if found is None or found.get("format") != FORMAT:
        raise Malformed("not a message of this engine, or of another version")
    fields = {name: found.get(name) for name in Header.__dataclass_fields__}
    kinds = {"nonce": str, "kind": str, "run": str, "round": int, "seconds": float}
    for name, kind in kinds.items():
        if type(fields[name]) is not kind:
            raise Malformed(f"its {name} is {fields[name]!r}")
    return Header(**fields)  # type: ignore[arg-type]


def size_of(content: RecordDict) -> int:
    """Bytes of the frame, as they lie here (not as the sender says)."""
    record = content.array_records.get(BODY)
    return 0 if record is None else sum(len(part.data) for part in record.values())


def frame_of(content: RecordDict) -> bytes:
    """The frame of a record."""
    record = content.array_records.get(BODY)
    if record is None or list(record) != [f"{i:06d}" for i in range(len(record))]:
        raise Malformed("its chunks are not in order")
    frame = b"".join(part.data for part in record.values())
    if content.config_records[HEADER].get("size") != len(frame):
        raise Malformed("its chunks are not complete")
    return frame
