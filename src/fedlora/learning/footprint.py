"""Memory of a long run: large blocks are reused while training, and what steps leave behind is given back.

Texts have many lengths, so every few batches bring a new shape. oneDNN keeps compiled kernels for up to 1,024 shapes
(some 0.2 MB each), and the allocator keeps the gaps that activations of other sizes left: after 2,000 steps of MiniLM
300 MB more were resident than after 40. And glibc maps every block above 32 MB anew, whose pages the system must clear:
a sixth of a language model's round.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

KERNELS = "64"
EVERY = 32
"""Units of work (fused steps, passes of scoring) between two looks at what is held."""
MORE = 1.1
"""How much more than was needed may be held: giving pages back costs as much as a step, which must touch them anew."""

MAP_ABOVE = 1 << 30
"""Bytes of a block from which it is mapped on its own."""


def prepare() -> None:
    """Bounds oneDNN's cache (unless the user did; only what happens before its first kernel counts), and lets glibc
    reuse large blocks."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
    if (mallopt := _libc("mallopt")) is not None:
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(parameter, MAP_ABOVE)


@dataclass(eq=False)
class Pages:
    """Gives free pages back to the system where more are held than were needed. ``needed``: the most bytes that were
    held some work after pages had been given back (or at first); ``released``: whether they were when last looked at.
    """

    needed: int = 0
    released: bool = True

    def look(self, held: int | None = None) -> None:
        """After some work; ``held``: bytes (default: those of this process)."""
        held = resident() if held is None else held
        if self.released:
            self.needed = max(self.needed, held)
        self.released = held > MORE * self.needed
        if self.released and (trim := _libc("malloc_trim")) is not None:
            trim(0)


def resident() -> int:
    """Bytes of this process that are in memory (0 where the system does not say)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@cache
def _libc(name: str) -> Any:
    """A function of the C library, on Linux, where it has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
