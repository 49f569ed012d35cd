"""Names and random streams: the order of names, seeds by purpose."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def in_order(names: Iterable[str]) -> list[str]:
    """Distinct names, sorted: by value where all are whole numbers, else as text.

    >>> in_order(["10", "2", "2"]), in_order(["b", "10", "2"])
    (['2', '10'], ['10', '2', 'b'])
    """
    distinct = set(names)
    # (Python takes no number of more than 4300 digits from text)
    if all(name.isascii() and name.removeprefix("-").isdigit() and len(name) < 1000 for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def nearest(name: str, known: Iterable[str]) -> str:
    """' (nearest: 'x')' for the known name most like this one, or nothing: to be put into an error.

    >>> nearest("lable", ["text", "label"])
    " (nearest: 'label')"
    """
    found = _closest(name, known)
    return "" if found is None else f" (nearest: {found!r})"


def meant(name: str, known: Iterable[str]) -> str:
    """The known name most like this one as a question, or the list of all: where the list is short.

    >>> meant("ranck", ["rank", "alpha"]), meant("xyz", ["rank", "alpha"])
    ("did you mean 'rank'?", 'known: alpha, rank')
    """
    names = sorted(known)
    found = _closest(name, names)
    return f"known: {', '.join(names)}" if found is None else f"did you mean {found!r}?"


def _closest(name: str, known: Iterable[str]) -> str | None:
    known = [str(k) for k in known]
    lowered = {k.strip().casefold(): k for k in reversed(known)}
    found = difflib.get_close_matches(name.strip().casefold(), lowered, n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


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
