"""Tables of results from one declared list of columns: on the terminal, as Markdown and as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import RenderableType

from prunekit.runtime.errors import UserError, markdown_cell, nearest
from prunekit.runtime.screen import fitted_table

Row = Mapping[str, Any]
MISSING = "–"
SEEN = "seen_"  # prefix of a figure's key: the same figure on training pictures
SEEN_NOTE = (
    "Measured on held-out pictures and their prompts; in parentheses: on training pictures. Above the floor: what is "
    "left when real pictures' own figure is taken off."
)


@dataclass(frozen=True)
class Column:
    """One column of a table: the key of its value in a row, and how the value is shown.

    A row holds base units (parameters, MACs, seconds); the shown number is the value · `scale`, in `unit`.
    """

    key: str
    title: str
    format: str = ""  # of Python's format(); empty for text
    direction: Literal["", "↑", "↓"] = ""  # which way is better
    unit: str = ""
    scale: float = 1.0

    @property
    def header(self) -> str:
        """The title with unit and direction."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.title}{unit}{' ' + self.direction if self.direction else ''}"

    def show(self, row: Row) -> str:
        """Return the row's value as text, or a dash; the value on training pictures follows in parentheses."""
        text, seen = self.shown(row.get(self.key)), row.get(SEEN + self.key)
        return text if seen is None else f"{text} ({self.shown(seen)})"

    def shown(self, value: Any) -> str:
        """Return a value as text; a dash for None and NaN."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return MISSING
        return format(value * self.scale, self.format) if self.format else str(value)


NAME = Column("name", "model")
COST = (
    Column("params", "parameters", ",.2f", "↓", "M", 1e-6),
    Column("macs", "MACs", ",.3f", "↓", "G", 1e-9),
    Column("macs_ratio", "MACs", ".1f", "↓", "% of dense", 100),
)
DISTANCES = (
    Column("cmmd", "CMMD", ".3f", "↓"),
    Column("cmmd_above", "CMMD above the floor", ".3f", "↓"),
    Column("kid", "KID", ".2f", "↓", "×1000", 1000),
    Column("kid_above", "KID above the floor", ".2f", "↓", "×1000", 1000),
    Column("frechet", "Fréchet", ".2f", "↓"),
)
TEXT = (
    Column("clip_score", "CLIP score", ".2f", "↑"),
    Column("top1", "top-1", ".1f", "↑", "%", 100),
    Column("top5", "top-5", ".1f", "↑", "%", 100),
    Column("pick_score", "PickScore", ".2f", "↑"),
)
COLUMNS = (
    NAME,
    *COST,
    Column("images", "images", ",.0f"),
    *DISTANCES,
    *TEXT,
    Column("agreement", "agreement MSE", ".4f", "↓"),
    Column("seconds_per_image", "seconds per image", ".3f", "↓", "s"),
    Column("training_seconds", "training time", ".1f", "↓", "min", 1 / 60),
    Column("training_passes", "training compute", ",.1f", "↓", "1000 dense passes", 1e-3),
)
EXPERT_COLUMNS = (
    Column("expert", "expert", ".0f"),
    *COST,
    Column("training_share", "training prompts", ".1f", "", "%", 100),
    Column("prompts", "evaluated prompts", ",.0f"),
    *TEXT,
    Column("agreement", "agreement MSE", ".4f", "↓"),
    Column("examples", "its prompts, for example"),
)
CEILING_COLUMNS = (Column("name", "pictures"), *(c for c in DISTANCES if c.key in ("cmmd", "kid")), *TEXT)


def axis(key: str) -> Column:
    """Return the column of an axis that a comparison declares (method, budget, seed, …); its values are text."""
    return Column(key, key.replace("_", " "))


def shown(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> list[Column]:
    """Return the columns for which at least one row has a value.

    Raises ValueError for a row with a key that no column shows, so that no figure is lost silently.
    """
    keys = [column.key for column in columns]
    for row in rows:
        for key in row:
            if key.removeprefix(SEEN) not in keys:
                hint = nearest(key, keys) or f"; the columns are {', '.join(keys)}"
                raise UserError(f"no column shows {key!r} of row {row.get('name')!r}{hint}")
    return [column for column in columns if any(row.get(column.key) is not None for row in rows)]


def terminal_table(
    rows: Sequence[Row], columns: Sequence[Column] = COLUMNS, title: str | None = None, width: int = 80
) -> RenderableType:
    """Return a table for a terminal of `width` characters; see `fitted_table`."""
    columns = shown(rows, columns)
    lines = [[column.show(row) for column in columns] for row in rows]
    return fitted_table([c.header for c in columns], lines, [bool(c.format) for c in columns], width, title)


def markdown_table(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> str:
    """Return a Markdown table that ends with a line break."""
    columns = shown(rows, columns)
    lines = [
        [column.header for column in columns],
        ["---:" if column.format else "---" for column in columns],
        *([markdown_cell(column.show(row)) for column in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def warning_lines(warnings: Sequence[str]) -> list[str]:
    """Return a section of warnings as parts of a Markdown page, below a table; no parts if there are no warnings."""
    return ["## Warnings\n", "".join(f"- {warning}.\n" for warning in warnings)] if warnings else []


def json_table(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> dict[str, list[dict]]:
    """Return {"columns", "rows"} for JSON: values unrounded and in base units, NaN and infinities as null."""
    columns = shown(rows, columns)

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "columns": [asdict(column) for column in columns],
        "rows": [{key: plain(row[key]) for key in _keys(columns) if key in row} for row in rows],
    }


def _keys(columns: Sequence[Column]) -> list[str]:
    return [key for column in columns for key in (column.key, SEEN + column.key)]
