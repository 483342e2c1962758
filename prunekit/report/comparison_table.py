"""The table of a comparison from its cells on disk: means, 95 % intervals, and the rows that cannot be told apart."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prunekit.evaluation.ceiling import REAL, REAL_TRAINING, TEXT_FIGURES, unfit, unfit_line
from prunekit.evaluation.table import COLUMNS, MISSING, SEEN, SEEN_NOTE, Column
from prunekit.evaluation.uncertainty import NORMAL_975, Estimate, estimate
from prunekit.evaluation.verdict import FIGURE
from prunekit.methods.result import share_warnings
from prunekit.report.paired import LEVEL, TESTED, Difference, difference, holm
from prunekit.runtime.run_directory import DENSE

STATIC = "static"  # protocol of a cell with one training, which is the same under every protocol
Result = dict[str, Any]  # a cell's JSON
COSTS = ("params", "macs", "macs_ratio")
TIMES = (
    Column("call_ratio", "denoiser call", ".2f", "↓", "× dense"),
    Column("training_seconds", "training", ".1f", "↓", "min", 1 / 60),
    Column("training_passes", "compute", ",.1f", "↓", "1000 dense passes", 1e-3),
)
QUALITY = ("cmmd", "cmmd_above", "kid", "kid_above", "clip_score", "top1", "top5", "frechet", "agreement")
BY_KEY = {column.key: column for column in (*COLUMNS, *TIMES)}
EQUAL_TOTAL = "equal_total"
EQUAL_COMPUTE = "equal_compute"
PROTOCOLS = {
    "equal_steps": "equal steps per model (the papers' protocol)",
    EQUAL_TOTAL: "equal total compute (calibration, search and fine-tuning of all models; cheaper rows train longer)",
    EQUAL_COMPUTE: "equal fine-tuning in total (each of N experts has 1/N of the steps; searches are not charged)",
}
TIMINGS = "timings.json"  # in a comparison's directory


@dataclass(frozen=True)
class Cell:
    """One method at one budget, seed and protocol; the dense model has no budget."""

    label: str
    budget: str  # as it is written in the recipe
    seed: int
    protocol: str = STATIC  # a key of PROTOCOLS, or "static"
    num_models: int = 1

    @property
    def name(self) -> str:
        """The stem of the cell's files."""
        parts = (self.label, self.budget, f"seed{self.seed}", self.protocol)
        return "__".join(part.replace(":", "-").replace(",", "") for part in parts if part)

    @property
    def choice(self) -> str:
        """The name shared by all cells that use one choice of architectures, which one process makes."""
        return Cell(self.label, self.budget, self.seed, "").name

    @property
    def title(self) -> str:
        """The cell's name in messages."""
        return " ".join(part for part in (self.label, self.budget, f"seed {self.seed}", self.protocol) if part)


@dataclass(frozen=True)
class Row:
    """One method at one budget under one protocol, over its seeds."""

    protocol: str
    budget: str
    method: str
    distillation: str
    seeds: tuple[int, ...]
    models: int
    steps: int
    estimates: Mapping[str, Estimate]
    costs: Mapping[str, float | None]  # means over the seeds
    differs: bool = False  # whether it trains differently under other protocols
    values: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # figure: {seed: value}
    errors: Mapping[str, float] = field(default_factory=dict)  # figure: error over the pictures, mean over the seeds


def rows_of(cells: Sequence[Result], timings: Mapping[str, float] | None = None) -> list[Row]:
    """Return the rows of all tables, by protocol, budget and method; a static cell is in the rows of every protocol.

    timings: {a cell's `models_folder`: time of its denoiser call divided by that of the dense model}.
    """
    protocols = [p for p in PROTOCOLS if any(cell["cell"]["protocol"] == p for cell in cells)] or ["equal_steps"]
    budgets = list(dict.fromkeys(cell["cell"]["budget"] for cell in cells if cell["cell"]["budget"]))
    methods = list(dict.fromkeys([DENSE, *(cell["cell"]["method"] for cell in cells)]))
    rows = []
    for protocol in protocols:
        for budget in budgets:
            for method in methods:
                repeated = [c for c in cells if _belongs(c, protocol, budget, method)]
                if method == DENSE:  # only the seeds of the budget's other rows
                    seeds = {c["cell"]["seed"] for c in cells if c["cell"]["budget"] == budget}
                    repeated = [cell for cell in repeated if cell["cell"]["seed"] in seeds]
                if repeated:
                    rows.append(_row(repeated, protocol, budget, method, timings or {}))
    return rows


def _belongs(cell: Result, protocol: str, budget: str, method: str) -> bool:
    axes = cell["cell"]
    return axes["method"] == method and axes["budget"] in ("", budget) and axes["protocol"] in (STATIC, protocol)


def _row(cells: list[Result], protocol: str, budget: str, method: str, timings: Mapping[str, float]) -> Row:
    cells = sorted(cells, key=lambda cell: cell["cell"]["seed"])
    pictures: dict[str, float] = {}
    by_seed: dict[str, dict[int, float]] = {}
    estimates, left_out = {}, {name for cell in cells for name in unfit(cell.get("known", {}))}
    for name in (*QUALITY, *(SEEN + name for name in QUALITY)):
        values = [cell["figures"].get(name) for cell in cells]
        if None not in values and name.removeprefix(SEEN) not in left_out:
            errors = [cell["errors"].get(name.removesuffix("_above"), 0.0) for cell in cells]
            estimates[name] = estimate(values, errors)
            pictures[name] = _mean(errors)
            by_seed[name] = {cell["cell"]["seed"]: value for cell, value in zip(cells, values, strict=True)}
    costs: dict[str, float | None] = {name: _mean(cell["figures"][name] for cell in cells) for name in COSTS}
    costs["params"] = _mean(_params(cell) for cell in cells)
    timed = [timings[cell["models_folder"]] for cell in cells if cell["models_folder"] in timings]
    costs["call_ratio"] = _mean(timed) if timed else None
    trained = [cell["figures"]["training_seconds"] for cell in cells]
    costs["training_seconds"] = None if None in trained else _mean(trained)
    computed = [cell["figures"].get("training_passes") for cell in cells]
    costs["training_passes"] = None if None in computed else _mean(computed)
    first = cells[0]
    seeds = tuple(cell["cell"]["seed"] for cell in cells)
    row = Row(protocol, budget, method, first["distillation"], seeds, first["models"], first["steps"], estimates, costs)
    return replace(row, differs=first["cell"]["protocol"] != STATIC, values=by_seed, errors=pictures)


def _params(cell: Result) -> int:
    """Return the parameters of a cell's experts with training prompts; old cells' figures count unused experts too."""
    used = [expert["params"] for expert in cell["experts"] if expert["training_share"]]
    return sum(used) if used else cell["figures"]["params"]


def warnings_of(cells: Sequence[Result]) -> list[str]:
    """Return the warnings about the cells' choices, one line each; a choice that several protocols share has one line.

    Cells of old versions recorded no warnings; warnings about their experts' shares of prompts follow from the figures.
    """
    warnings = []
    for cell in cells:
        axes = cell["cell"]
        lines = cell.get("warnings")
        if lines is None:
            lines = share_warnings([expert["training_share"] for expert in cell["experts"]])
        warnings += [f"{axes['method']} {axes['budget']} seed {axes['seed']}: {line}" for line in lines]
    return list(dict.fromkeys(warnings))


def known_lines(cells: Sequence[Result]) -> list[str]:
    """Return the lines above the tables: the pictures that the figures were measured on, and the figures' floors."""
    known = next((cell["known"] for cell in cells if REAL_TRAINING in cell.get("known", {})), None)
    if known is None:
        held = {cell["fields"].get("data.holdout_by", "captions") for cell in cells}
        on_training = "Measured on pictures that fine-tuning has seen; only some of their captions were held out."
        return [on_training] if held == {"captions"} else []
    held, training = known[REAL], known[REAL_TRAINING]
    columns = [BY_KEY[key] for key in ("cmmd", "kid", *TEXT_FIGURES)]
    floors = [
        f"{column.title} {column.shown(held.get(column.key))} ({column.shown(training.get(column.key))})"
        for column in columns
    ]
    return [f"{SEEN_NOTE} Real pictures in place of drawn ones: {', '.join(floors)}."] + [
        f"{unfit_line(name, known)}." for name in unfit(known)
    ]


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def best(rows: Sequence[Row], name: str) -> Row:
    """Return the pruned row with the best mean of a figure; the dense row if there is no pruned row."""
    rows = [row for row in rows if name in row.estimates]
    pruned = [row for row in rows if row.method != DENSE] or rows
    sign = -1 if BY_KEY[name].direction == "↑" else 1
    return min(pruned, key=lambda row: sign * row.estimates[name].mean)


def shown_rows(rows: Sequence[Row]) -> tuple[list[dict[str, str]], list[Column]]:
    """Return one table's rows and columns as text: means, and halves of the 95 % intervals over seeds and pictures.

    For each figure, the best pruned row is bold, and "≈" marks a row that cannot be told from the best row.
    """
    columns = [Column("name", "method"), Column("distillation", "distillation"), Column("seeds", "seeds")]
    figures = [key for key in QUALITY if any(key in row.estimates for row in rows)]
    columns += [replace(BY_KEY[key], format="", scale=1.0) for key in (*COSTS, *figures)]
    columns += [replace(column, format="", scale=1.0) for column in TIMES]
    lines = []
    for row in rows:
        line = {"name": row.method, "distillation": row.distillation, "seeds": str(len(row.seeds))}
        line |= {key: BY_KEY[key].show({key: value}) for key, value in row.costs.items()}
        line |= {key: _shown(row, rows, key) for key in figures}
        lines.append(line)
    return lines, columns


def _shown(row: Row, rows: Sequence[Row], key: str) -> str:
    if key not in row.estimates:
        return MISSING
    figure, column, top = row.estimates[key], BY_KEY[key], best(rows, key)
    text = column.shown(figure.mean)
    if any(halves := _halves(row, key)):
        text += f" ± {' / '.join(column.shown(half) for half in halves)}"
    if (seen := row.estimates.get(SEEN + key)) is not None:
        text += f" ({column.shown(seen.mean)})"
    if row.method == DENSE:
        return text
    if row is top:
        return f"**{text}**"
    return text + (" ≈" if key in inseparable(row, rows) else "")


def _halves(row: Row, key: str) -> tuple[float | None, float]:
    """Return half the 95 % interval of a figure over the seeds (None for one seed), and half that over the pictures."""
    figure, pictures = row.estimates[key], NORMAL_975 * row.errors.get(key, 0.0)
    return (None if figure.count == 1 else (figure.high - figure.low) / 2), pictures


def inseparable(row: Row, rows: Sequence[Row]) -> set[str]:
    """Return the figures in which a pruned row cannot be told from the best row.

    The test uses the paired differences over their seeds, with Holm's correction over the rows of the table. If two
    rows have fewer than two seeds in common, they cannot be told apart if their intervals overlap.
    """
    tied_figures = set()
    for key in row.estimates.keys() & set(QUALITY):
        top = best(rows, key)
        others = [other for other in rows if other.method != DENSE and other is not top and key in other.estimates]
        against = [difference(other.values.get(key, {}), top.values.get(key, {})) for other in others]
        tested = [(other, gap) for other, gap in zip(others, against, strict=True) if gap is not None]
        adjusted = dict(zip((id(o) for o, _ in tested), holm([gap.p for _, gap in tested]), strict=True))
        if row is top:
            continue
        if adjusted.get(id(row), LEVEL if row.estimates[key].overlaps(top.estimates[key]) else 0.0) >= LEVEL:
            tied_figures.add(key)
    return tied_figures


def verdict(rows: Sequence[Row]) -> str:
    """Return one sentence per budget, under the first protocol, with the best row and the rows that equal it.

    The compared figure is the agreement with the dense model; the result is "" if no pruned row has it.
    """
    first = [row for row in rows if row.protocol == rows[0].protocol and FIGURE in row.estimates]
    sentences = []
    for budget in dict.fromkeys(row.budget for row in first):
        section = [row for row in first if row.budget == budget]
        if pruned := [row for row in section if row.method != DENSE]:
            sentences.append(_sentence(pruned, section, budget))
    return " ".join(sentences)


def _sentence(pruned: Sequence[Row], section: Sequence[Row], budget: str) -> str:
    top, *others = sorted(pruned, key=lambda row: row.estimates[FIGURE].mean)
    value = BY_KEY[FIGURE].shown(top.estimates[FIGURE].mean)
    if not others:
        return f"At budget {budget}, {top.method} has an agreement MSE of {value}."
    said = f"At budget {budget}, {top.method} has the lowest agreement MSE, {value}"
    equal = [row for row in others if FIGURE in inseparable(row, section)]
    worse = [row for row in others if row not in equal]
    held = (top, *(equal or others[:1]))
    count = min(len(row.seeds) for row in held)
    if count == 1 and not all(row.errors.get(FIGURE) for row in held):  # cells of old versions recorded no errors
        return f"{said}; the next is {_named(others[0])}; with one seed and no recorded errors, the noise is unknown."
    noise = f"noise of {count} seeds" if count > 1 else "noise of the samples (one seed)"
    if not equal:
        return f"{said}; the next is {_named(others[0])}, a difference beyond the {noise}."
    rest = "" if not worse else f"; {len(worse)} of the other rows {'is' if len(worse) == 1 else 'are'} worse beyond it"
    return f"{said}; the {noise} does not separate it from {', '.join(row.method for row in equal)}{rest}."


def _named(row: Row) -> str:
    return f"{row.method}, {BY_KEY[FIGURE].shown(row.estimates[FIGURE].mean)}"


def paired_rows(rows: Sequence[Row], pairs: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Return the differences of the pairs of rows that a recipe names, under every protocol and budget.

    Holm's correction is over all differences together. A pair with fewer than two seeds in common is left out.
    """
    comparisons: list[tuple[dict[str, Any], Difference]] = []
    places = dict.fromkeys((row.protocol, row.budget) for row in rows)
    for protocol, budget in places:
        table = {row.method: row for row in rows if (row.protocol, row.budget) == (protocol, budget)}
        for first, second in pairs:
            for key in TESTED:
                if first in table and second in table:
                    gap = difference(table[first].values.get(key, {}), table[second].values.get(key, {}))
                    place = {"protocol": protocol, "budget": budget, "first": first, "second": second, "figure": key}
                    comparisons += [(place, gap)] if gap is not None else []
    adjusted = holm([gap.p for _, gap in comparisons])
    return [{**place, **asdict(gap), "adjusted": p} for (place, gap), p in zip(comparisons, adjusted, strict=True)]


PAIR_COLUMNS = [Column(key, key) for key in ("protocol", "budget", "rows", "figure", "difference", "seeds", "p", "")]


def paired_lines(differences: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the differences as text for PAIR_COLUMNS, one line each."""
    lines = []
    for pair in differences:
        column = BY_KEY[pair["figure"]]
        mean, low, high = (f"{pair[name] * column.scale:+.3g}" for name in ("mean", "low", "high"))
        better = (pair["mean"] < 0) == (column.direction == "↓")
        verdict = f"{pair['first']} is {'better' if better else 'worse'}" if pair["adjusted"] < LEVEL else "inseparable"
        lines.append(
            {
                "protocol": pair["protocol"].replace("_", " "),
                "budget": pair["budget"],
                "rows": f"{pair['first']} − {pair['second']}",
                "figure": column.title,
                "difference": f"{mean} [{low}, {high}]",
                "seeds": str(pair["count"]),
                "p": f"{pair['adjusted']:.2g}",
                "": verdict,
            }
        )
    return lines


def json_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows for JSON, in base units."""
    return [asdict(row) for row in rows]


def csv_text(rows: Sequence[Row]) -> str:
    """Return the rows as CSV, with mean, standard deviation over seeds and ends of the interval for each figure."""
    output = io.StringIO()
    parts = ("mean", "deviation", "low", "high")
    keys = [key for key in (*QUALITY, *(SEEN + key for key in QUALITY)) if any(key in row.estimates for row in rows)]
    figures = [f"{key}_{part}" for key in keys for part in parts]
    axes = ("protocol", "budget", "method", "distillation", "models", "steps")
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow([*axes, "seeds", *COSTS, *(column.key for column in TIMES), *figures])
    for row in rows:
        values: list[Any] = [getattr(row, axis) for axis in axes] + [" ".join(map(str, row.seeds))]
        values += [row.costs[key] for key in (*COSTS, *(column.key for column in TIMES))]
        values += [getattr(row.estimates.get(key), part, None) for key in keys for part in parts]
        writer.writerow(values)
    return output.getvalue()
