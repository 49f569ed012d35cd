"""Names and random streams: client ids as path parts, the order of names, seeds by purpose."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from urllib.parse import quote, unquote

import numpy as np

from fedlora.errors import UserError


def encode_id(client: str) -> str:
    """A client id as one safe path part: percent-encoded UTF-8, reversible by `decode_id`.

    "." and ".." (and any leading dot) are encoded too, so that no id can name another folder or hide;
    the empty id is a lone "%", which no other id encodes to. Raises `UserError` where the part would be
    longer than file systems allow.

    >>> encode_id("St. Mary/ward 3"), encode_id(".."), encode_id("")
    ('St.%20Mary%2Fward%203', '%2E.', '%')
    """
    if not client:
        return "%"
    part = quote(client, safe="")
    if part.startswith("."):
        part = "%2E" + part[1:]
    if len(part) > 240:
        raise UserError(f"client id {client[:40]!r}... is too long for a file name", "shorten it below 80 characters")
    return part


def decode_id(part: str) -> str:
    """The client id of a path part made by `encode_id`.

    >>> decode_id(encode_id("a%2E/ü"))
    'a%2E/ü'
    """
    return "" if part == "%" else unquote(part)


def in_order(names: Iterable[str]) -> list[str]:
    """Distinct names, sorted: by value where all are whole numbers, else as text.

    >>> in_order(["10", "2", "2"]), in_order(["b", "10", "2"])
    (['2', '10'], ['10', '2', 'b'])
    """
    distinct = set(names)
    if all(name.isascii() and name.removeprefix("-").isdigit() for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def nearest(name: str, known: Iterable[str]) -> str:
    """' (nearest: 'x')' for the known name most like this one, or nothing: to be put into an error.

    >>> nearest("lable", ["text", "label"])
    " (nearest: 'label')"
    """
    known = [str(k) for k in known]
    lowered = {k.strip().casefold(): k for k in reversed(known)}
    found = difflib.get_close_matches(name.strip().casefold(), lowered, n=1, cutoff=0.5)
    return f" (nearest: {lowered[found[0]]!r})" if found else ""


def listed(names: Sequence[str], limit: int = 8) -> str:
    """The first few names, quoted, and how many more there are.

    >>> listed(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def stream(seed: int, *purpose: object) -> np.random.Generator:
    """A random stream of its own for every seed and purpose, the same on every machine (SHA-256, never `hash()`).

    >>> int(stream(1, "split").integers(100)) == int(stream(1, "split").integers(100))
    True
    """
    key = "\x1f".join([str(seed), *(str(part) for part in purpose)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))
