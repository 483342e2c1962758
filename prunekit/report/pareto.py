"""Pareto charts of a comparison: quality against exact MACs and against measured time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunekit.evaluation.sheets import save_figure
from prunekit.report.comparison_table import BY_KEY, Row
from prunekit.runtime.run_directory import DENSE

PANELS = ("cmmd", "clip_score", "agreement")  # figures; the first two that every row has are drawn
COSTS = {"macs_ratio": "exact MACs (% of dense)", "call_ratio": "time of a denoiser call (% of dense)"}
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8B4513", "#4B0082")
MARKERS = "*osD^vP<>X"
SHIFT = 0.35  # percentage points between the rows of one budget, so that their bars do not overlap


def pareto_picture(path: Path, rows: Sequence[Row], title: str) -> Path:
    """Write a PNG of the rows' means and 95 % intervals, and return its path.

    Markers are filled; a row that trains differently under the protocols has open markers for all but equal steps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    costs, panels = costs_of(rows), panels_of(rows)
    figure = Figure(figsize=(5.2 * len(costs) + 2.2, 3.9 * len(panels)), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), len(costs), squeeze=False)
    for line, figure_name in zip(axes, panels, strict=True):
        for panel, cost in zip(line, costs, strict=True):
            pareto_panel(panel, rows, figure_name, cost)
            panel.grid(color="#dddddd", linewidth=0.6)
            panel.set_axisbelow(True)
    handles, labels = _legend(axes[0][0])
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1 - 2.0 / figure.get_figwidth(), 0.97))
    return save_figure(figure, path)


def costs_of(rows: Sequence[Row]) -> list[str]:
    """Return the costs, keys of COSTS, that some pruned row has."""
    return [key for key in COSTS if any(row.costs.get(key) is not None and row.method != DENSE for row in rows)]


def panels_of(rows: Sequence[Row]) -> list[str]:
    """Return the figures that are drawn: the first two of PANELS that every row has."""
    return [name for name in PANELS if all(name in row.estimates for row in rows)][:2]


def pareto_panel(panel: Any, rows: Sequence[Row], name: str, cost: str) -> None:
    """Draw the rows' figure `name` against `cost` on a matplotlib panel, with labels for a legend."""
    methods, points = list(dict.fromkeys(row.method for row in rows)), _distinct(rows)
    for row in points:
        _point(panel, row, methods.index(row.method), name, cost, len(methods))
    _limit(panel, points, name)
    panel.set_xlabel(COSTS[cost])
    panel.set_ylabel(BY_KEY[name].header)


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without copies; a row that several protocols share appears once."""
    seen, distinct = set(), []
    for row in rows:
        key = (row.method, row.budget if row.method != DENSE else "", row.steps)
        if key not in seen:
            seen.add(key)
            distinct.append(row)
    return distinct


def _point(panel, row: Row, index: int, name: str, cost: str, count: int) -> None:
    value = 1.0 if row.method == DENSE else row.costs.get(cost)
    if value is None:
        return
    column, estimate = BY_KEY[name], row.estimates[name]
    open_marker = row.differs and row.protocol != "equal_steps"
    color = COLORS[index % len(COLORS)]
    protocol = f", {row.protocol.replace('_', ' ')}" if row.differs else ""
    shift = 0.0 if row.method == DENSE else SHIFT * (index - count / 2 + 0.5 * open_marker)
    panel.errorbar(
        100 * value + (shift if cost == "macs_ratio" else 0),
        estimate.mean * column.scale,
        yerr=(estimate.high - estimate.low) / 2 * column.scale,
        fmt=MARKERS[index % len(MARKERS)],
        color=color,
        markerfacecolor="white" if open_marker else color,
        markersize=9 if row.method == DENSE else 6,
        elinewidth=1,
        capsize=2,
        label=row.method + protocol,
    )


def _limit(panel, rows: Sequence[Row], name: str) -> None:
    """Fit the y axis to the means, so that one wide interval does not flatten all others; CMMD's is logarithmic."""
    from matplotlib.ticker import LogLocator, NullFormatter

    means = [row.estimates[name].mean * BY_KEY[name].scale for row in rows]
    low, high = min(means), max(means)
    if name == "cmmd" and low > 0:
        panel.set_yscale("log")
        panel.set_ylim(low / 1.5, high * 1.5)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # with labels at all minor ticks they would overlap
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    elif high > low:
        margin = 0.2 * (high - low)
        panel.set_ylim(low - margin, high + margin)


def _legend(panel) -> tuple[list, list[str]]:
    handles, labels = panel.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    return list(unique.values()), list(unique)
