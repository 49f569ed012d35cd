"""What a user can put right: an error that names the thing, the value, the place and the remedy."""

from __future__ import annotations


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
