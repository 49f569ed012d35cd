"""What a user can put right: an error that names the thing, the value, the place and the remedy."""

from __future__ import annotations

import errno
import os
import re

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE}
_PATHS = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


class UserError(Exception):
    """A mistake in a file, a configuration or a command; shown without a traceback.

    >>> raise UserError("data.csv, line 3: column 'label' is empty", "fill it in or drop the line")
    Traceback (most recent call last):
        ...
    fedlora.errors.UserError: data.csv, line 3: column 'label' is empty
      -> fill it in or drop the line
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}\n  -> {remedy}" if remedy else problem)


class Interrupted(Exception):
    """Ctrl-C during a run: the message says how to resume it."""


def refused(error: BaseException) -> str | None:
    """What the system would not do with a file: a full disk, a missing right; None for errors of any other kind.

    >>> refused(PermissionError(13, "Permission denied", "runs/a")), refused(OSError(28, "No space left on device"))
    ('runs/a: Permission denied', 'No space left on device')
    >>> refused(KeyError("runs/a"))
    """
    if type(error).__name__ == "SafetensorError":  # of a library that takes long to import
        code = re.search(r"\(os error (\d+)\)", str(error))
        return None if code is None else os.strerror(int(code[1]))
    if not isinstance(error, OSError):
        return None
    path = error.filename2 or error.filename
    if error.errno not in _FULL and (path is None or error.errno not in _PATHS):
        return None
    return f"{path}: {error.strerror}" if path is not None else error.strerror
