"""Record the results of a step: rows of figures, and comparisons with the CPU. Files are written after every piece.

OUTPUT/STEP.json holds the finished pieces, each with its environment; OUTPUT/STEP.md shows them. A finished piece from
the same device and the same versions is not run again.
"""

import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from prunekit.measuring.environment import SAME, environment
from prunekit.runtime.files import read_json, write_json, write_text

FORMAT = 1
Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Difference of a result from the reference: float32, eager, on the CPU, from the same weights.

    error: relative L2 error, unless `what` names another error. tolerance: largest error at which they count as equal.
    """

    what: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance; False for NaN and infinity."""
        return math.isfinite(self.error) and self.error <= self.tolerance


@dataclass
class Found:
    """Results of a piece. rows: figures by column. left_out: what was not run, and why."""

    rows: list[Row] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """A part of a step; a later call runs it again unless it finished."""

    name: str
    make: Callable[[], Found]


class UnfinishedError(Exception):
    """A piece ran out of time; it has saved its own results, and the next call resumes it."""


@dataclass(frozen=True)
class Settings:
    """Settings of all steps. deadline: value of time.monotonic() at which a step should have ended."""

    device: torch.device
    reduced: bool
    output: Path
    deadline: float

    @property
    def minutes_left(self) -> float:
        """Minutes until the deadline, at least 0."""
        return max(0.0, (self.deadline - time.monotonic()) / 60)


class Record:
    """The JSON and Markdown files of one step."""

    def __init__(self, step: str, title: str, settings: Settings):
        self.title, self.settings = title, settings
        self.path = settings.output / f"{step}.json"
        here = environment(settings.device)
        self.environment = {name: here[name] for name in (*SAME, "kind", "transformers", "triton", "python", "load")}
        content = read_json(self.path) if self.path.is_file() else {}
        same = content.get("format") == FORMAT and content.get("reduced") == settings.reduced
        self.pieces: dict[str, Row] = content.get("pieces", {}) if same else {}

    def has(self, name: str) -> bool:
        """Whether a finished piece from this device and these versions is recorded."""
        piece = self.pieces.get(name)
        return piece is not None and piece["state"] == "made" and self._is_here(piece)

    def work(self, pieces: Sequence[Piece], say: Callable[[str], Any]) -> bool:
        """Run the missing pieces until the deadline; return whether all pieces finished without an error."""
        longest = 0.0
        names = [piece.name for piece in pieces]
        self.pieces = {name: self.pieces[name] for name in names if name in self.pieces}
        for piece in pieces:
            if self.has(piece.name):
                continue
            started = time.monotonic()
            if started + longest > self.settings.deadline:
                say(f"out of time before: {piece.name}")
                break
            state, found = self._make(piece)
            took = time.monotonic() - started
            longest = max(longest, took)
            self.pieces[piece.name] = {
                "state": state,
                "seconds": round(took, 2),
                "rows": found.rows,
                "comparisons": [asdict(comparison) | {"holds": comparison.holds} for comparison in found.comparisons],
                "left_out": found.left_out,
                "environment": self.environment,
            }
            self._write(names)
            say(f"{piece.name}: {state}, {_verdict(found.comparisons)} ({took:.0f} s)")
        self._write(names)
        return all(map(self.has, names))

    def _make(self, piece: Piece) -> tuple[str, Found]:
        """Run a piece; return its state and its results.

        The state is "made", or "unfinished" or "failed" with the reason in `left_out`. A failure does not stop the
        other pieces.
        """
        try:
            return "made", piece.make()
        except UnfinishedError as left:
            return "unfinished", Found(left_out=[str(left)])
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error)[:400]} ({Path(place.filename).name}:{place.lineno})"
            traceback.print_exc()
            return "failed", Found(left_out=[text])

    def _is_here(self, piece: Mapping[str, Any]) -> bool:
        return all(piece["environment"].get(name) == self.environment[name] for name in SAME)

    def _write(self, names: Sequence[str]) -> None:
        missing = [name for name in names if not self.has(name)]
        content = {"format": FORMAT, "title": self.title, "reduced": self.settings.reduced, "missing": missing}
        write_json(self.path, {**content, "pieces": self.pieces})
        write_text(self.path.with_suffix(".md"), page(self.title, self.pieces, missing))


def _verdict(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return "nothing compared"
    worst = max(comparisons, key=lambda one: one.error / one.tolerance if math.isfinite(one.error) else math.inf)
    failed = sum(not one.holds for one in comparisons)
    text = f"{len(comparisons)} compared, worst {worst.error:.1e} of {worst.tolerance:.0e} ({worst.what})"
    return f"{text}, {failed} TOO FAR" if failed else text


def page(title: str, pieces: Mapping[str, Row], missing: Sequence[str]) -> str:
    """Return the Markdown page of a step."""
    parts = [f"# {title}\n"]
    if missing:
        parts.append(f"Missing: {'; '.join(missing)}.\n")
    for name, piece in pieces.items():
        here = piece["environment"]
        versions = ", ".join(f"{key} {here[key]}" for key in ("torch", "diffusers", "cuda", "driver") if here.get(key))
        parts.append(f"## {name}\n\n{piece['state']}; {here['device']}, {versions}; {piece['seconds']:.0f} s\n")
        parts += [
            f"- left out: {text}" if index else f"\n- left out: {text}" for index, text in enumerate(piece["left_out"])
        ]
        if piece["rows"]:
            parts.append(f"\n{table(piece['rows'])}")
        if piece["comparisons"]:
            parts.append(f"\n{table([_compared(row) for row in piece['comparisons']])}")
    return "\n".join(parts) + "\n"


def _compared(row: Row) -> Row:
    verdict = "yes" if row["holds"] else "**no**"
    return {"compared": row["what"], "error": f"{row['error']:.2e}", "tolerance": row["tolerance"], "equal": verdict}


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table, with a column for every key that occurs in any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(key)) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
