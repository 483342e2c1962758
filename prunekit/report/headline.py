"""The headline: tables of every row's figures with their intervals, and charts of quality against cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prunekit.evaluation.table import COLUMNS, EXPERT_COLUMNS, SEEN, SEEN_NOTE, Column, shown
from prunekit.evaluation.uncertainty import estimate
from prunekit.report.comparison_table import (
    BY_KEY,
    PAIR_COLUMNS,
    PROTOCOLS,
    QUALITY,
    TIMINGS,
    Row,
    known_lines,
    paired_lines,
    rows_of,
    shown_rows,
)
from prunekit.report.pareto import COSTS, costs_of, panels_of, pareto_panel
from prunekit.report.source import MissingError, Section, Source
from prunekit.report.svg import inline_svg, legend_below, new_figure, style
from prunekit.runtime.files import read_json
from prunekit.runtime.run_directory import DENSE

TITLE = "What was cut, and what it cost"
RUN_NOTE = (
    "± is half of the 95 % interval over the pictures (1.96 jackknife errors): how far a figure would move with other "
    "pictures of the same model. It says nothing of other seeds. Arrows: which way is better."
)
PLAIN_NOTE = "This run recorded no intervals; a run of this version does. Arrows: which way is better."
COMPARE_NOTE = (
    "Each figure is the mean over the seeds. Below it, after ±: half of its 95 % interval over the seeds (Student's t; "
    "– for one seed), and after the slash half of that over one seed's pictures (1.96 jackknife errors). Bold: the "
    "best pruned row. ≈: the row cannot be told from the best one (paired by seed, Holm's correction over the rows; "
    "with one seed: the intervals overlap). In the charts, a bar that leaves the frame is longer than shown."
)
PAIRS_TITLE = "Pairs, paired by seed: mean and 95 % interval, p with Holm's correction over all of them"
MINOR_TICKS = (1.5, 2, 3, 4, 5, 7)  # between the powers of ten of a logarithmic axis
NEAR_ZERO = 5  # a logarithmic axis begins no lower than at the smallest mean divided by this number
Table = dict[str, Any]


def headline(source: Source) -> Section:
    """Return the section. Raises MissingError before anything was measured."""
    tables, rows, note = _of_comparison(source) if source.is_comparison else _of_run(source)
    return Section(
        "headline", TITLE, {"tables": tables, "note": note, "figures": _pareto(rows, whole=not source.is_comparison)}
    )


def html_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], title: str = "") -> Table:
    """Return a table for the page: header and cells as text, and a list that says which columns are numbers.

    A cell whose text is between `**` is strong, as in Markdown.
    """
    columns = shown(rows, columns)
    cells = [[column.show(row) for column in columns] for row in rows]
    lines = [[{"text": text.strip("*"), "strong": text.startswith("**")} for text in line] for line in cells]
    numeric = [bool(column.format) or column.key not in ("name", "distillation", "examples") for column in columns]
    return {"title": title, "header": [column.header for column in columns], "rows": lines, "numeric": numeric}


def _of_run(source: Source) -> tuple[list[Table], list[Row], str]:
    if "table" not in source.results:
        raise MissingError("the run has no measurements yet: `prunekit resume` continues it")
    rows = source.results["table"]["rows"]
    errors = {row["name"]: source.metrics(row["name"], "errors") or {} for row in rows}
    lines = [_with_intervals(row, errors[row["name"]]) for row in rows]
    tables = [html_table(lines, [_as_text(column) for column in COLUMNS])]
    for name, table in source.results.get("experts", {}).items():
        tables += [html_table(table["rows"], EXPERT_COLUMNS, f"Experts of {name}")]
    for key, title in (
        ("latency", "Latency as the budget"),
        ("evaluator", "What the evaluator says of known pictures"),
    ):
        if key in source.results:
            columns = [Column(**column) for column in source.results[key]["columns"]]
            tables += [html_table(source.results[key]["rows"], columns, title)]
    points = [_point(row, errors[row["name"]]) for row in rows]
    note = RUN_NOTE if any(errors.values()) else PLAIN_NOTE
    return tables, points, f"{note} {SEEN_NOTE}" if any(key.startswith(SEEN) for row in rows for key in row) else note


def _as_text(column: Column) -> Column:
    return Column(column.key, column.title, "", column.direction, column.unit)


def _with_intervals(row: Mapping[str, Any], errors: Mapping[str, float]) -> dict[str, Any]:
    """Return a row's figures as text, with their intervals."""
    line: dict[str, Any] = {}
    for column in COLUMNS:
        if row.get(column.key) is None:
            continue
        line[column.key] = column.shown(row[column.key])
        error = errors.get(column.key)
        if error is not None and math.isfinite(error):
            value = estimate([row[column.key]], [error])
            line[column.key] += f" ± {column.shown((value.high - value.low) / 2)}"
        if (seen := row.get(SEEN + column.key)) is not None:
            line[column.key] += f" ({column.shown(seen)})"
    return line


def _point(row: Mapping[str, Any], errors: Mapping[str, float]) -> Row:
    """Return a run's row as a comparison's row with one seed, for the charts."""
    finite = {name: error if math.isfinite(error) else 0.0 for name, error in errors.items()}
    figures = {
        name: estimate([row[name]], [finite.get(name, 0.0)]) for name in QUALITY if isinstance(row.get(name), float)
    }
    costs = {"macs_ratio": row["macs_ratio"], "call_ratio": None}
    return Row("equal_steps", "", row["name"], "", (0,), 1, 0, figures, costs)


def _of_comparison(source: Source) -> tuple[list[Table], list[Row], str]:
    if not source.cells:
        raise MissingError("no cell of the comparison is finished yet: `prunekit compare` continues it")
    path = source.directory / TIMINGS
    rows, tables = rows_of(source.cells, read_json(path) if path.is_file() else {}), []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        for budget in dict.fromkeys(row.budget for row in rows):
            table_rows = [row for row in rows if row.protocol == protocol and row.budget == budget]
            if table_rows:
                tables += [html_table(*shown_rows(table_rows), f"Budget {budget}, {PROTOCOLS[protocol]}")]
    if differences := source.results.get("pairs"):
        tables += [html_table(paired_lines(differences), PAIR_COLUMNS, PAIRS_TITLE)]
    published = source.results.get("published") or source.recipe.get("published") or []
    if published:
        columns = [Column(key, key) for key in dict.fromkeys(key for row in published for key in row)]
        tables += [html_table(published, columns, "As published")]
    missing = source.results.get("missing")
    note = " ".join([COMPARE_NOTE, *known_lines(source.cells)])
    note = f"{note} Still missing: {', '.join(missing)}." if missing else note
    return tables, rows, note


def _pareto(rows: Sequence[Row], whole: bool) -> list[str]:
    """Return the charts of the rows that have the figures; none if there is only the dense model.

    whole: show every interval in full, however wide.
    """
    drawn = [row for row in rows if row.estimates]
    panels = panels_of(drawn)
    drawn = [row for row in drawn if all(math.isfinite(row.estimates[name].mean) for name in panels)]
    if not panels or not any(row.method != DENSE for row in drawn):
        return []
    from matplotlib.ticker import LogLocator

    pictures = []
    with style():
        for name, cost in ((name, cost) for cost in costs_of(drawn) for name in panels):
            figure, panel = new_figure(4.6, 3.4)
            pareto_panel(panel, drawn, name, cost)
            if whole:
                _show_intervals(panel, drawn, name)
            panel.set_title(f"{BY_KEY[name].title} against {COSTS[cost].partition(' (')[0]}")
            if panel.get_yscale() == "log":
                panel.yaxis.set_minor_locator(LogLocator(subs=MINOR_TICKS))
                panel.tick_params(axis="y", which="both", labelsize=9)
            legend_below(figure, panel, 2)
            pictures.append(inline_svg(figure, f"{BY_KEY[name].title} of every row against its cost"))
    return pictures


def _show_intervals(panel: Any, rows: Sequence[Row], name: str) -> None:
    """Widen a panel's y axis to the ends of the intervals; a logarithmic axis still cuts off ends near zero."""
    scale = BY_KEY[name].scale
    means = [row.estimates[name].mean * scale for row in rows]
    lows, highs = ([getattr(row.estimates[name], end) * scale for row in rows] for end in ("low", "high"))
    if panel.get_yscale() == "log":
        panel.set_ylim(max(min(lows), min(means) / NEAR_ZERO) / 1.1, max(highs) * 1.1)
    else:
        margin = 0.05 * (max(highs) - min(lows)) or 0.05 * (max(means) - min(means)) or 1.0
        panel.set_ylim(min(lows) - margin, max(highs) + margin)
