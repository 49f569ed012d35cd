"""Examples that are almost the same, so that no copy of a training example is ever tested on.

Two texts are near-copies where they agree after case, punctuation, digits and spacing are dropped, or where MinHash
puts the Jaccard similarity of their word pairs at 0.75 or more. Long texts are compared by their first and last 64
words. The cost is linear: each example is compared only with the first one of each of its 8 hash buckets.
Images are copies where their bytes agree.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path

import datasets
import numpy as np

_NOISE = re.compile(r"[\W\d_]+")
_LETTERS = bytes(code if chr(code).isalpha() and code < 128 else ord(" ") for code in range(256))
_HASHES, _BANDS = 32, 8
_SIMILAR = 0.75
_EDGE = 64  # words taken from each end of a text
_SHORT = 256  # characters up to which a text is held itself
_MIX, _MIX_AGAIN = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def contents(table: datasets.Dataset) -> Iterator[bytes]:
    """What each example asks the model to read: the texts (prompt and response together), or the image's bytes."""
    if "image" not in table.column_names:
        yield from (text.encode() for text in _texts(table))
        return
    for batch in table.data.select(["image"]).to_batches(max_chunksize=1000):
        for image in batch.columns[0].to_pylist():
            yield image["bytes"] or Path(image["path"]).read_bytes()


def _texts(table: datasets.Dataset) -> Iterator[str]:
    names = [name for name in table.column_names if name != "label"]
    for batch in table.data.select(names).to_batches(max_chunksize=1000):
        yield from map("\n".join, zip(*(column.to_pylist() for column in batch.columns), strict=True))


def exact_groups(table: datasets.Dataset) -> np.ndarray:
    """(rows,) int64: equal numbers for equal images, or for texts that differ in case and spacing alone."""
    if "image" in table.column_names:
        return _number(hashlib.sha256(content).digest() for content in contents(table))
    return _number(_key(" ".join(text.casefold().split())) for text in _texts(table))


def near_groups(table: datasets.Dataset) -> np.ndarray:
    """(rows,) int64: equal numbers for near-copies. Deterministic, O(rows) time and memory."""
    if "image" in table.column_names:
        return exact_groups(table)
    return near_copies(_texts(table))


def near_copies(texts: Iterable[str]) -> np.ndarray:
    """Group numbers of texts.

    >>> near_copies(["Block 17 is full!", "block 9 is full", "disk is full"]).tolist()
    [0, 0, 1]
    """
    seen: dict[str | bytes, int] = {}
    ends: list[str] = []  # of each distinct text, what its sketch is made of
    same = []
    for text in texts:
        normal = normalise(text)
        number = seen.setdefault(normal if len(normal) <= _SHORT else _key(normal), len(seen))
        same.append(number)
        if number == len(ends):
            words = normal.split()
            ends.append(normal if len(words) <= 2 * _EDGE else " ".join(words[:_EDGE] + words[-_EDGE:]))
    return _number(_joined(_sketches(ends))[same].tolist())


def normalise(text: str) -> str:
    """Words in lower case without digits and punctuation; the text itself where nothing else would remain.

    >>> normalise("Error 404:  Not_found!"), normalise("12 + 5 = ?")
    ('error not found', '12 + 5 = ?')
    """
    folded = text.casefold()
    if folded.isascii():  # the same, several times as fast
        words = folded.encode().translate(_LETTERS).split()
        return b" ".join(words).decode() or " ".join(folded.split())
    return _NOISE.sub(" ", folded).strip() or " ".join(folded.split())


def soften(near: np.ndarray, exact: Callable[[], np.ndarray], client: np.ndarray) -> tuple[np.ndarray, int]:
    """Groups to split by, and how many near-groups were too large to keep.

    A near-group that holds more than half of some client's rows (one shared template, say) would leave that client
    nothing to test on: its rows fall back to their exact groups, which are asked for only then. All arrays are (rows,)
    int64.
    """
    n_clients = int(client.max()) + 1 if len(client) else 0
    sizes = np.bincount(client, minlength=n_clients)
    pairs, counts = np.unique(near * n_clients + client, return_counts=True)
    owner = pairs % n_clients if n_clients else pairs
    large = np.unique(pairs[(counts > sizes[owner] / 2) & (counts > 1)] // max(n_clients, 1))
    if not len(large):
        return _number(near.tolist()), 0
    dissolved, copies = np.isin(near, large), exact()
    mixed = np.where(dissolved, copies + near.max(initial=0) + 1, near)
    broken = sum(len(np.unique(copies[near == group])) > 1 for group in large) if len(large) < 10_000 else len(large)
    return _number(mixed.tolist()), broken


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _number(keys: Iterable[object]) -> np.ndarray:
    """Each key's number in order of first appearance."""
    seen: defaultdict[object, int] = defaultdict(count().__next__)
    return np.fromiter(map(seen.__getitem__, keys), dtype=np.int64)


def _sketches(texts: Sequence[str]) -> np.ndarray:
    """(texts, 32) uint32: MinHash values over word pairs; texts of fewer than four words get values of their own."""
    numbers: defaultdict[str, int] = defaultdict(count().__next__)
    rng = np.random.default_rng(0)  # the hash functions are fixed: no seed changes who is whose copy
    factors = rng.integers(0, 2**63, _HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    sketches = np.empty((len(texts), _HASHES), dtype=np.uint32)
    for start in range(0, len(texts), 2000):
        words, ends = [], []
        for text in texts[start : start + 2000]:
            split = text.split()
            if len(split) < 4:  # too short for similarity to mean anything: equal to itself only
                split = [f"{start + len(ends)}\n{i}" for i in range(4)]
            words += map(numbers.__getitem__, split)
            ends.append(len(words))
        ids = np.array(words, dtype=np.uint64) + np.uint64(1)
        pairs = _scramble(_scramble(ids[:-1]) + ids[1:])
        begins = np.array([0, *ends[:-1]])
        edges = np.stack([begins, np.array(ends) - 1], axis=1).ravel()[:-1]  # a pair never spans two texts
        mixed, shifted = np.empty_like(pairs), np.empty_like(pairs)
        for k, factor in enumerate(factors * _MIX):
            np.multiply(pairs, factor, out=mixed)  # as ``_scramble(pairs * its factor)`` but for the lower half, which
            np.right_shift(mixed, np.uint64(29), out=shifted)  # does not decide the upper half of the smallest
            mixed ^= shifted
            mixed *= _MIX_AGAIN
            sketches[start : start + len(ends), k] = np.minimum.reduceat(mixed, edges)[::2] >> np.uint64(32)
    return sketches


def _scramble(values: np.ndarray) -> np.ndarray:
    """A 64-bit mixing step (multiplication wraps by design)."""
    mixed = values * _MIX
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MIX_AGAIN
    mixed ^= mixed >> np.uint64(32)
    return mixed


def _joined(sketches: np.ndarray) -> np.ndarray:
    """(texts,) component numbers: each text is linked to the first text of a bucket whose sketch it mostly shares."""
    n = len(sketches)
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    links = []
    for band in np.split(sketches, _BANDS, axis=1):
        key = np.zeros(n, dtype=np.uint64)
        for column in band.T:
            key = _scramble(key ^ column)
        _, first, bucket = np.unique(key, return_index=True, return_inverse=True)
        leader = first[bucket]
        rows = np.flatnonzero(leader != np.arange(n))
        alike = (sketches[rows] == sketches[leader[rows]]).mean(axis=1) >= _SIMILAR
        links.append(np.stack([rows[alike], leader[rows[alike]]]))
    a, b = np.concatenate(links, axis=1)
    if not len(a):
        return np.arange(n)
    from scipy.sparse import coo_array  # many data have no near-copies, and it takes a quarter of a second
    from scipy.sparse.csgraph import connected_components

    return connected_components(coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(n, n)), directed=False)[1]
