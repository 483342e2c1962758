"""Training: loss by term, learning rate, time per step and memory of every training of the run."""

from collections.abc import Sequence
from typing import Any

from prunekit.report.source import MissingError, Section, Source
from prunekit.report.svg import COLORS, color, inline_svg, legend_below, new_figure, plain_log_axis, style
from prunekit.runtime.run_directory import LOG

OTHER = {"stage", "step", "rate", "seconds", "loss", "memory"}  # keys of a row that are not terms of the loss
MOST_TRAININGS = 24
SHORT = 14  # longest name, in characters, of which three fit on one line of a legend
APART = 30  # above this ratio of largest to smallest value, the axis is logarithmic
MOST_POINTS = 400  # per curve
LINES = ("-", "--", ":", "-.")
NOTE = (
    "Each point is one batch. The loss is the sum of its terms, which are drawn with their weights. Memory is the "
    "highest so far: of the GPU where there is one, else of the process. Rates, times and memory are "
    "of the first eight trainings."
)
Row = dict[str, Any]


def training(source: Source) -> Section:
    """Return the section. Raises MissingError if the log has no training step."""
    trainings = by_training(source.log)
    if not trainings:
        raise MissingError(f"the directory holds no log of a training ({LOG})")
    shown = dict(list(trainings.items())[:MOST_TRAININGS])
    rest = len(trainings) - len(shown)
    times = {title: step_times(rows) for title, rows in shown.items()}
    content = {
        "losses": [_losses(title, rows) for title, rows in shown.items()],
        "rates": _together(shown, "rate", "Learning rate", "learning rate"),
        "times": _together(times, "time", "Time of a step", "time (s)"),
        "memory": _together(shown, "memory", "Memory", "memory (GiB)", 2**-30),
        "table": {"header": ["training", "steps", "time (min)", "step (s)", "last loss"], "rows": _table(trainings)},
        "note": NOTE + (f" {rest} further trainings are only in the table." if rest else ""),
    }
    return Section("training", "Training", content)


def by_training(log: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each training, ordered by step; a step that was repeated after a kill has its last row."""
    stages: dict[str, dict[int, Row]] = {}
    for row in log:
        if "step" in row and "loss" in row:
            stages.setdefault(row["stage"], {})[row["step"]] = row
    return {title: [rows[step] for step in sorted(rows)] for title, rows in stages.items()}


def step_times(rows: Sequence[Row]) -> list[Row]:
    """Return, for each row, the mean seconds per step since the previous row (for the first row, since the start)."""
    times, step, seconds = [], 0, 0.0
    for row in rows:
        if row["seconds"] >= seconds and row["step"] > step:
            times.append({"step": row["step"], "time": (row["seconds"] - seconds) / (row["step"] - step)})
        step, seconds = row["step"], row["seconds"]
    return times


def _table(trainings: dict[str, list[Row]]) -> list[list[str]]:
    return [
        [
            title,
            f"{rows[-1]['step']:,}",
            f"{rows[-1]['seconds'] / 60:.1f}",
            f"{rows[-1]['seconds'] / rows[-1]['step']:.3f}",
            f"{rows[-1]['loss']:.4g}",
        ]
        for title, rows in trainings.items()
    ]


def _losses(title: str, rows: Sequence[Row]) -> str:
    """Return a chart of the loss and its terms (Figure 6 of the APTP paper); logarithmic if all values are positive."""
    terms = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in OTHER]
    rows = thinned(rows)
    with style():
        figure, panel = new_figure(4.6, 2.9)
        for index, name in enumerate(["loss", *terms]):
            points = [(row["step"], row[name]) for row in rows if name in row]
            line_color = "#000000" if name == "loss" else color(index - 1)
            look = {"color": line_color, "linestyle": LINES[index % len(LINES)], "linewidth": 1.4}
            panel.plot(*zip(*points, strict=True), label="sum" if name == "loss" else name, **look, **_dot(points))
        values = [row[name] for row in rows for name in ("loss", *terms) if name in row]
        if min(values) > 0:
            plain_log_axis(panel)
        panel.set_title(f"Loss: {title}")
        panel.set_xlabel("step")
        panel.set_ylabel("loss")
        legend_below(figure, panel, 3)
        return inline_svg(figure, f"loss of {title} by term")


def _together(trainings: dict[str, list[Row]], key: str, title: str, unit: str, scale: float = 1.0) -> str | None:
    """Return a chart of the key `key` for the first eight trainings that recorded it; None if no training did."""
    curves: dict[str, list[tuple[Any, Any]]] = {}
    for name, rows in trainings.items():
        points = [(row["step"], row[key] * scale) for row in rows if row.get(key) is not None]
        if points and len(curves) < len(COLORS):
            curves[name] = thinned(points)
    if not curves:
        return None
    with style():
        figure, panel = new_figure(4.6, 2.9)
        for index, (name, points) in enumerate(curves.items()):
            look = {"color": color(index), "linestyle": LINES[index % len(LINES)], "linewidth": 1.3}
            panel.plot(*zip(*points, strict=True), label=name, **look, **_dot(points))
        values = [value for points in curves.values() for _, value in points]
        if min(values) > 0 and max(values) > APART * min(values):
            plain_log_axis(panel)
        else:
            panel.set_ylim(bottom=0)
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.set_ylabel(unit)
        legend_below(figure, panel, 3 if max(map(len, curves)) <= SHORT else 1)
        return inline_svg(figure, f"{title.lower()} of every training")


def thinned(points: Sequence[Any], most: int = MOST_POINTS) -> list[Any]:
    """Return about `most` of the points, evenly spaced; the last point is always kept."""
    every = -(-len(points) // most)
    return [*points[::every], *([points[-1]] if (len(points) - 1) % every else [])]


def _dot(points: Sequence[Any]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(points) < 12 else {}
