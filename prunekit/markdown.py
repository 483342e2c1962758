"""Text that comes from data, in Markdown: it stays text, within its cell or line, and is no HTML."""

import re

SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$])")  # what begins a link, a picture, code, emphasis or a formula
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


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
