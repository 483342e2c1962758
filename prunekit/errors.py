"""The error that is shown to a user as one line, and the hint that most of them carry."""

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave; the message is one line that says what was given, allowed, and to do.

    What was given may hold line breaks and control characters: see `plain_line`.
    """

    def __init__(self, *message: Any, **more: Any):
        super().__init__(*(plain_line(part) if isinstance(part, str) else part for part in message), **more)


class MissingPackageError(UserError, ImportError):
    """A package that is not installed; the message names the extra that has it."""


def plain_line(text: str) -> str:
    """Return a text as one line: breaks become spaces, and what a terminal would obey or not show is escaped."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def plain_name(text: str, what: str) -> str:
    """Return a text that is to name one file or directory.

    Raises:
        UserError: it is empty, a path, longer than a file name may be, or holds control characters.

    """
    wrong = (
        not text.strip() or text != text.strip() or text in (".", "..") or len(text.encode("utf-8", "replace")) > 200
    )
    if wrong or any(letter in "/\\" or unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        raise UserError(f"{what}={text!r}: give a plain name of 1 to 200 bytes, without slashes and control characters")
    return text


def nearest(given: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """Return "; did you mean 'x'?" with the nearest known names, or nothing where none is near.

    count: how many names at most. cutoff: least similarity, as in `difflib.get_close_matches`.
    """
    near = difflib.get_close_matches(given, list(known), count, cutoff)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return an error's message as one line without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
