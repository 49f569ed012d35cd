"""Pretraining text: the docstrings of what is installed here, without the held-out code bases."""

import random
import re
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from fedlora.data.packages import HELD_OUT, docstrings, locate

COPIES = ("multiprocess", "distutils")
"""Copies of code bases: multiprocess is the held-out multiprocessing, setuptools carries distutils."""

ITEM = re.compile(r"(\n{2,}|\n(?=[ ]*[*`\w][^\n]*[:)][^\n]*\n[ ]+))")
"""Ends of paragraphs and of a parameter's description, kept when splitting."""


@dataclass(frozen=True)
class Document:
    """The docstrings of one file."""

    package: str
    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents divided by file, with the packages they come from and the licences those name."""

    train: list[Document]
    validation: list[Document]
    licences: dict[str, str]


def collect(seed: int, held_out_share: float = 0.05) -> Corpus:
    """Read, drop what repeats and divide by file; what repeats a held-out code base's docstrings is dropped too."""
    seen = {shingle for name in HELD_OUT if locate(name) for _, text in docstrings(name) for shingle in _shingles(text)}
    documents: list[Document] = []
    licences: dict[str, str] = {}
    for package, licence in sorted(_packages().items()):
        kept = list(_fresh(package, seen))
        documents += kept
        if kept:
            licences[package] = licence
    random.Random(seed).shuffle(documents)
    count = round(len(documents) * held_out_share)
    return Corpus(documents[count:], documents[:count], licences)


def _packages() -> dict[str, str]:
    """Importable top-level names of the standard library and of installed distributions, with their licences."""
    found = dict.fromkeys(sorted(sys.stdlib_module_names), "PSF-2.0 (Python standard library)")
    for name, distributions in metadata.packages_distributions().items():
        if name.isidentifier():
            found[name] = _licence(distributions[0])
    excluded = {*HELD_OUT, *COPIES, "fedlora"}
    return {
        name: licence
        for name, licence in found.items()
        if name not in excluded and "GPL" not in licence and locate(name) is not None
    }


def _licence(distribution: str) -> str:
    about = metadata.metadata(distribution)
    stated = (about["License"] or "").strip()
    classified = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    # Some packages put the whole licence text in the field.
    named = about["License-Expression"] or (stated if len(stated) <= 60 else "") or ", ".join(classified)
    return f"{named or stated.splitlines()[0] if stated or named else 'not stated'} ({distribution} {about['Version']})"


def _fresh(package: str, seen: set[int]) -> Iterable[Document]:
    prefixes = tuple(name.replace(".", "/") for name in HELD_OUT if name.startswith(package + "."))
    for path, text in docstrings(package):
        if any(f"{package}/{path}".startswith((prefix + "/", prefix + ".py")) for prefix in prefixes):
            continue
        parts: list[str] = []
        for part in ITEM.split(text):
            shingles = _shingles(part)
            if len(shingles) < 3 or sum(shingle in seen for shingle in shingles) <= len(shingles) / 2:
                parts.append(part)
            seen.update(shingles)
        body = "".join(parts).strip()
        if len(body) >= 200:
            yield Document(package, path, re.sub(r"\n{3,}", "\n\n", body) + "\n")


def _shingles(part: str) -> list[int]:
    """Every four words in a row: boilerplate that differs in a name or a number still counts as a copy."""
    words = re.findall(r"[a-z]+", part.lower())
    return [zlib.crc32(" ".join(words[i : i + 4]).encode()) for i in range(len(words) - 3)]
