"""The page: put its sections, in order, into one file that needs no other file."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup, escape

from prunekit.evaluation.verdict import verdict
from prunekit.report import comparison_table
from prunekit.report.architectures import architectures
from prunekit.report.comparison_table import rows_of
from prunekit.report.headline import headline
from prunekit.report.routing_map import routing
from prunekit.report.sensitivity import sensitivity
from prunekit.report.source import MissingError, Section, Source
from prunekit.report.training_curves import training
from prunekit.report.trust import trust
from prunekit.report.wall import wall
from prunekit.runtime.files import write_text

REPORT = "report.html"
MOST_BYTES = 8_000_000
SECTIONS: dict[str, tuple[str, Callable[[Source], Section]]] = {
    "headline": ("What was cut, and what it cost", headline),
    "wall": ("What it looks like", wall),
    "architectures": ("What stays of the denoiser", architectures),
    "routing": ("Routing", routing),
    "sensitivity": ("Sensitivity", sensitivity),
    "training": ("Training", training),
    "trust": ("Can it be trusted?", trust),
}


def write_report(directory: str | Path) -> Path:
    """Write `report.html` of a run or a comparison into its directory, from the files there; return the path.

    A section without data is replaced by one line that says why. Raises ValueError, one line, for a directory that is
    neither a run nor a comparison.
    """
    source = Source(Path(directory))
    path = source.directory / REPORT
    write_text(path, page(source))
    return path


def page(source: Source) -> str:
    """Return the page as HTML."""
    sections = [_section(key, source) for key in SECTIONS]
    kind = "Comparison" if source.is_comparison else source.recipe.get("job", "Run").replace("prune", "run")
    return (
        _templates()
        .get_template("page.html.j2")
        .render(name=source.name, kind=kind.capitalize(), sections=sections, summary=_summary(source))
    )


def _section(key: str, source: Source) -> Section:
    """Return a section, or the reason why it is missing, so that an old or unfinished run still gives a page."""
    title, make = SECTIONS[key]
    try:
        return make(source)
    except MissingError as error:
        return Section(key, title, reason=str(error))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        text = " ".join(str(error).split())
        return Section(key, title, reason=f"what the run holds cannot be read ({type(error).__name__}: {text})")


def _summary(source: Source) -> str:
    """Return the page's first sentence."""
    if source.is_comparison:
        names = list(dict.fromkeys(cell["cell"]["method"] for cell in source.cells))
        if not names:
            return "No cell is finished yet."
        cells = f"{len(source.cells)} finished cells: {', '.join(names)}."
        return " ".join(filter(None, (comparison_table.verdict(rows_of(source.cells)), cells)))
    rows = source.results.get("table", {}).get("rows") or []
    pruned = [f"{row['name']} keeps {100 * row['macs_ratio']:.1f} %" for row in rows if row["macs_ratio"] < 1]
    kept = f"Of the dense model's MACs {', '.join(pruned)}." if pruned else ""
    return " ".join(filter(None, (verdict(rows, source.errors), kept)))


def _with_code(text: str) -> Markup:
    """Return a sentence as HTML, with text in backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


@cache
def _templates() -> Any:
    environment = Environment(
        loader=PackageLoader("prunekit.report"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    environment.filters["with_code"] = _with_code
    return environment
