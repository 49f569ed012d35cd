"""Starts a program that ends with its parent, however that ends: ``python leash.py PARENT PROGRAM WORDS...`` (Linux).

A killed server would leave its SuperLink and its door behind, which hold its port; nobody would end them. It is a file
of its own that imports next to nothing: what it starts takes its place, with the same process id.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Entry point."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # it outlives exec
    if os.getppid() != parent:  # gone before it was asked for
        sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
