"""The error that is shown to a user as one line, and the hint that most of them carry."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave; the message is one line that says what was given, allowed, and to do."""


class MissingPackageError(UserError, ImportError):
    """A package that is not installed; the message names the extra that has it."""


def nearest(given: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" with the nearest known name, or nothing where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
