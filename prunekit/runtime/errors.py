"""The error that is shown to a user as one line, and text from outside made harmless: for a terminal, a file name, or
Markdown.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$])")  # what begins a link, a picture, code, emphasis or a formula
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


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


def cannot_listen(host: str, port: int | None) -> UserError:
    """Return the error of a server whose address is taken, or not this machine's."""
    where = f"{host}:{port}" if port else host
    return UserError(f"cannot listen on {where}: it is taken or not this machine's; give another --port")


def first_line(error: BaseException) -> str:
    """Return an error's message as one line without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def markdown_cell(text: str) -> str:
    """Return a text that stays within one cell of a Markdown table, with HTML escaped."""
    return _without_html(text).replace("\\", "\\\\").replace("|", r"\|")


def markdown_text(text: str) -> str:
    """Return a text that stays within one line and shows as it is: no HTML, no link, no formatting."""
    return SPECIAL.sub(r"\\\1", _without_html(text))


def _without_html(text: str) -> str:
    text = " ".join(text.split())
    for letter, entity in ENTITIES.items():
        text = text.replace(letter, entity)
    return text
