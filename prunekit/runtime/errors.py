"""The error that a user sees as one line; functions that make outside text safe in terminals, file names, Markdown."""

import difflib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$])")  # characters that begin Markdown syntax
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


class UserError(ValueError):
    """Invalid input from the user; the message says in one line what was given, what is allowed, and what to do.

    The message may quote input with line breaks and control characters: `plain_line` replaces them.
    """

    def __init__(self, *message: Any, **more: Any):
        super().__init__(*(plain_line(part) if isinstance(part, str) else part for part in message), **more)


class MissingPackageError(UserError, ImportError):
    """A package that is not installed; the message names the extra that has it."""


def plain_line(text: str) -> str:
    """Return a text as one line: line breaks become spaces, and non-printable characters are escaped."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def plain_name(text: str, what: str) -> str:
    """Return a text unchanged if it can name one file or directory.

    Args:
        text: the name.
        what: name of the setting, for the error.

    Raises:
        UserError: the text is empty, a path, longer than 200 bytes, begins or ends with a space, or has control
            characters.

    """
    wrong = (
        not text.strip() or text != text.strip() or text in (".", "..") or len(text.encode("utf-8", "replace")) > 200
    )
    if wrong or any(letter in "/\\" or unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        raise UserError(f"{what}={text!r}: give a plain name of 1 to 200 bytes, without slashes and control characters")
    return text


def nearest(given: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """Return "; did you mean 'x'?" with the nearest known names, or "" if no known name is near.

    count: largest number of names. cutoff: smallest similarity, as in `difflib.get_close_matches`.
    """
    near = difflib.get_close_matches(given, list(known), count, cutoff)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def cannot_listen(host: str, port: int | None) -> UserError:
    """Return the error for a server address that is in use or does not belong to this machine."""
    where = f"{host}:{port}" if port else host
    return UserError(f"cannot listen on {where}: it is taken or not this machine's; give another --port")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or the error's class name if it is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def markdown_cell(text: str) -> str:
    """Return a text that stays within one cell of a Markdown table, with HTML escaped."""
    return _without_html(text).replace("\\", "\\\\").replace("|", r"\|")


def markdown_text(text: str) -> str:
    """Return a text as one line with HTML and Markdown syntax escaped, so that it is shown as it is."""
    return SPECIAL.sub(r"\\\1", _without_html(text))


def _without_html(text: str) -> str:
    text = " ".join(text.split())
    for letter, entity in ENTITIES.items():
        text = text.replace(letter, entity)
    return text
