"""Keeps a long run's memory flat: what a step leaves behind is given back.

Texts have many lengths, so every few batches bring a new shape. oneDNN keeps compiled kernels for up to 1,024 shapes
(some 0.2 MB each), and the allocator keeps the gaps that activations of other sizes left: after 2,000 steps of MiniLM
300 MB more were resident than after 40. A small cache costs no measurable time, since shapes rarely come back soon.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

KERNELS = "64"
EVERY = 16
"""Units of work (fused steps, passes of scoring) between two releases."""


def limit_kernels() -> None:
    """Bounds oneDNN's cache, unless the user did; only what happens before its first kernel counts."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)


def _trimmer() -> Callable[[], object]:
    """glibc's malloc_trim, where there is one."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return (lambda: None) if trim is None else (lambda: trim(0))


release = _trimmer()
"""Gives free pages back to the system."""
