"""Standard output: a console, and tables that fit its width without dropping a column or cutting a cell."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 160  # characters per line if there is no terminal and COLUMNS is not set
LEAST_TEXT = 12  # characters per line that text in a table needs at least; numbers are never broken
FRAME, RIM = 3, 1  # characters that each column, and the whole table, take in addition to their content
BREAKS = "./_,;:-"  # characters after which a word that is too long may be broken
INDENT = "  "
NUMBER = re.compile(r"[^\sA-Za-z]+")  # a word without letters, which is not broken
Grid = list[list["Cell"]]


def stdout_console() -> Console:
    """Return a console on standard output; without a terminal, its width is COLUMNS characters, or 160 if not set."""
    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=PLAIN_WIDTH)


@dataclass(frozen=True)
class Cell:
    """A cell's text, and whether its column holds numbers, which are not broken over lines."""

    text: str
    is_number: bool = False

    @property
    def width(self) -> int:
        """Characters in the longest line of the text."""
        return max(map(cell_len, self.text.splitlines()), default=0)

    @property
    def least(self) -> int:
        """Characters per line that the cell needs at least."""
        whole = self.is_number or NUMBER.fullmatch(self.text)
        return self.width if whole else min(self.width, LEAST_TEXT)


def fitted_table(
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    numeric: Sequence[bool],
    width: int,
    title: str | None = None,
    strong_end: bool = False,
) -> RenderableType:
    """Return a table of at most `width` characters per line, in the first form that fits.

    The forms are a line per row, a line per column, and a block of lines per row. Text is broken over lines if the
    table then fits; numbers are not. Without rows, return the title alone.

    Args:
        header: the columns' titles.
        lines: the cells of each row, as plain text.
        numeric: for each column, whether it holds numbers, which are aligned to the right.
        width: characters per line.
        title: shown above the table.
        strong_end: whether the last row is a total, shown in bold.

    """
    if not lines:
        return Text(title or "")
    grid: Grid = [[Cell(text) for text in header]]
    grid += [[Cell(text, number) for text, number in zip(line, numeric, strict=True)] for line in lines]
    sides: list[JustifyMethod] = ["right" if number else "left" for number in numeric]
    if widths := _widths(grid, width):
        return _table(grid, widths, sides, title, strong_end)
    turned: Grid = [list(column) for column in zip(*grid, strict=True)]
    if widths := _widths(turned, width):
        return _table(turned, widths, ["left", *["right"] * len(lines)], title, False)  # type: ignore[list-item]
    return _blocks(grid, width, title)


def print_table(
    console: Console,
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    numeric: Sequence[str] = (),
    title: str | None = None,
    strong_end: bool = False,
) -> None:
    """Print a table that fits the console.

    numeric: titles of the columns that hold numbers. The other arguments are as in `fitted_table`.
    """
    numbers = [name in numeric for name in header]
    console.print(fitted_table(header, lines, numbers, console.width, title, strong_end))


def _widths(grid: Grid, width: int) -> list[int] | None:
    """Return the columns' widths; None where they do not fit."""
    wanted = [max(cell.width for cell in column) for column in zip(*grid, strict=True)]
    widths = [max(cell.least for cell in column) for column in zip(*grid, strict=True)]
    spare = width - RIM - sum(widths) - FRAME * len(widths)
    if spare < 0:
        return None
    for _ in range(spare):
        shortages = [full - given for full, given in zip(wanted, widths, strict=True)]
        widths[shortages.index(max(shortages))] += max(shortages) > 0
    return widths


def _table(
    grid: Grid, widths: Sequence[int], sides: Sequence[JustifyMethod], title: str | None, strong_end: bool
) -> Table:
    table = Table(title=title, title_justify="left")
    first, *rest = ([Text(wrapped(c.text, w)) for c, w in zip(line, widths, strict=True)] for line in grid)
    for cell, side in zip(first, sides, strict=True):
        table.add_column(cell, justify=side, no_wrap=True)
    for index, line in enumerate(rest, start=1):
        table.add_row(*line, style="bold" if strong_end and index == len(rest) else None)
    return table


def _blocks(grid: Grid, width: int, title: str | None) -> Group:
    """Return a block of lines for each row: its first cell, and below it a line for each other cell."""
    names, *rows = grid
    label = min(max((cell.width for cell in names[1:]), default=0), width // 2)
    parts: list[Text] = [Text(wrapped(title, width), style="italic")] if title else []
    for row in rows:
        parts.append(Text(wrapped(f"{names[0].text}: {row[0].text}", width), style="bold"))
        for name, cell in zip(names[1:], row[1:], strict=True):
            left = wrapped(name.text, label).splitlines() or [""]
            right = wrapped(cell.text, max(1, width - label - 2 * len(INDENT))).splitlines() or [""]
            for index in range(max(len(left), len(right))):
                start, end = (side[index] if index < len(side) else "" for side in (left, right))
                parts.append(Text(f"{INDENT}{start}{' ' * (label - cell_len(start))}{INDENT}{end}".rstrip()))
    return Group(*parts)


def wrapped(text: str, width: int) -> str:
    """Return text in lines of at most `width` characters: broken at spaces, else after one of BREAKS, else anywhere."""
    lines = []
    for line in text.splitlines():
        current = ""
        for word in line.split(" "):
            joined = f"{current} {word}" if current else word
            if cell_len(joined) <= width:
                current = joined
                continue
            lines += [current] if current else []
            *whole, current = _pieces(word, width)
            lines += whole
        lines.append(current)
    return "\n".join(lines)


def _pieces(word: str, width: int) -> list[str]:
    """Return a word in pieces of at most `width` characters."""
    pieces = []
    while cell_len(word) > width:
        end = 1
        while end < len(word) and cell_len(word[: end + 1]) <= width:
            end += 1
        at = max(word.rfind(letter, 0, end) for letter in BREAKS) + 1
        end = at or end
        pieces.append(word[:end])
        word = word[end:]
    return [*pieces, word]
