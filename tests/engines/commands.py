"""The command line in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "fedlora.cli", *map(str, words)]


def done(*words: object) -> str:
    """What it printed, once it has ended well."""
    ended = subprocess.run(command(*words), capture_output=True, text=True, env=ENVIRONMENT, timeout=400)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout
