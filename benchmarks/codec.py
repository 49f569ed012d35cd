"""What framing costs: megabytes per second into bytes and back, for updates of several sizes and types."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Report

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "MiniLM, rank 8": {f"{k}.{name}": (384, 384) for k in range(6) for name in ("query", "value")},
    "1.3 B, rank 200": {
        f"{k}.{name}": (2048, width) for k in range(24) for name, width in zip("qkvogud", [2048] * 4 + [5504] * 3)
    },
}
RANKS = {"MiniLM, rank 8": 8, "1.3 B, rank 200": 200}
TYPES = (torch.float32, torch.bfloat16, torch.int8)
SECONDS = 1.0
"""That each direction is repeated for, at least."""


def tree(shapes: dict[str, tuple[int, int]], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors of every site."""
    draws = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for site, (out, inner) in shapes.items():
        for name, shape in (("A", (rank, inner)), ("B", (out, rank))):
            found[f"{site}/{name}"] = (20 * torch.randn(shape, generator=draws)).to(dtype)
    return found


def timed(what: Callable[[], Any], seconds: float) -> float:
    """The median time of a call, after one that is not counted."""
    what()
    found: list[float] = []
    while not found or sum(found) < seconds:
        start = time.perf_counter()
        what()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def run(quick: bool = False) -> Report:
    """Each size and type both ways, beside a plain copy of as many bytes."""
    from fedlora.federation.wire import decode, encode, frame_size

    rows: list[tuple[object, ...]] = []
    for name, shapes in SHAPES.items():
        for dtype in TYPES:
            used = dict(list(shapes.items())[:12]) if quick else shapes
            given = tree(used, RANKS[name], dtype)
            frame = encode(given)
            size, numbers = len(frame) / 1e6, sum(value.nbytes for value in given.values()) / 1e6
            assert len(frame) == frame_size(given)
            spent = 0.05 if quick else SECONDS
            there, back = timed(partial(encode, given), spent), timed(partial(decode, frame), spent)
            copy = timed(partial(bytearray, frame), spent)
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            rows.append((what, size, size / there, size / back, size / copy, 100 * (size / numbers - 1)))
    return Report(
        "codec",
        "Frames: MB/s of what travels",
        ("update", "MB", "encode, MB/s", "decode, MB/s", "a plain copy, MB/s", "header, %"),
        rows,
        (
            "factors of every adapted site as one frame (`federation/wire.py`), in memory; medians over a second each",
            "the types are the tensors' own: the codec casts nothing",
        ),
    )
