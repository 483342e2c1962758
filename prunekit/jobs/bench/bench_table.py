"""The rows of a benchmark as one table per device, with published times."""

from collections.abc import Sequence

from prunekit.jobs.bench.bench_recipe import BenchRecipe
from prunekit.jobs.bench.bench_rows import Row
from prunekit.runtime.run_directory import DENSE

MISSING = "–"
COLUMNS = (
    "architecture",
    "what",
    "how",
    "MACs of dense",
    "parameters of dense",
    "p50 (ms)",
    "p90 (ms)",
    "p99 (ms)",
    "n",
    "time of dense [95 %]",
    "noise floor",
    "latency per MAC",
    "peak memory (GB)",
    "published (s an image)",
    "published, of dense",
    "note",
)
WORDS = ("architecture", "what", "how", "note")  # columns that are text
BRIEF = ("architecture", "what", "how", "MACs of dense", "p50 (ms)", "n", *COLUMNS[9:12], "published, of dense", "note")


def cells_of(row: Row, recipe: BenchRecipe) -> list[str]:
    """Return a row's text in the order of `COLUMNS`."""
    ratio, published, dense = row["latency_ratio"], row["published_seconds"], recipe.published_dense_seconds
    layout = "" if row["memory_format"] == "contiguous" else f", {row['memory_format']}"
    what = row["workload"] if row["workload"] == "unet" else f"{row['workload']} ({row['unet_calls']} denoiser calls)"
    peak = None if row["peak_bytes"] is None else (row["weight_bytes"] + row["peak_bytes"]) / 1e9
    return [
        row["architecture"],
        what,
        f"{row['dtype']}, {row['mode']}{layout}",
        f"{row['macs_ratio']:.4f}",
        f"{row['params_ratio']:.4f}",
        *(f"{1e3 * row[name]:,.2f}" for name in ("p50", "p90", "p99")),
        str(row["count"]),
        MISSING if ratio is None else f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
        f"±{row['noise_floor']:.1%}",
        _number(row["latency_per_mac"], ".3f"),
        _number(peak, ".2f"),
        _number(published, ".1f"),
        _number(published and dense and published / dense, ".3f"),
        _note(row),
    ]


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _note(row: Row) -> str:
    notes = []
    if row["not_faster"]:
        notes.append("NOT FASTER: its MACs fell, its time did not beyond the noise")
    if row.get("unaligned"):
        notes.append(f"{len(row['unaligned'])} widths not aligned")
    if not row["is_warm"]:
        notes.append("had not settled")
    if not row["is_finite"]:
        notes.append("output not finite")
    return "; ".join(notes)


def shown(
    rows: Sequence[Row], recipe: BenchRecipe, columns: Sequence[str] = COLUMNS
) -> tuple[list[str], list[list[str]]]:
    """Return (header, lines) of those columns that at least one row fills."""
    lines = [cells_of(row, recipe) for row in rows]
    wanted = [COLUMNS.index(name) for name in columns]
    filled = [index for index in wanted if any(line[index] not in ("", MISSING) for line in lines)]
    return [COLUMNS[index] for index in filled], [[line[index] for index in filled] for line in lines]


def markdown(rows: Sequence[Row], recipe: BenchRecipe) -> str:
    """Return the page with all rows as Markdown, one section per device."""
    parts = [f"# {recipe.name}\n\n{settings_line(recipe)}\n"]
    for device in dict.fromkeys(row["environment"]["device"] for row in rows):
        device_rows = [row for row in rows if row["environment"]["device"] == device]
        header, lines = shown(device_rows, recipe)
        parts.append(f"\n## {device}\n\n{environment_line(device_rows[0])}\n\n")
        rule = ["---" if name in WORDS else "---:" for name in header]
        parts += [f"| {' | '.join(line)} |\n" for line in (header, rule, *lines)]
    if recipe.published:
        parts.append(f"\nPublished: {recipe.published}.\n")
    return "".join(parts)


def settings_line(recipe: BenchRecipe) -> str:
    """Return a text with the settings that all rows share and the meaning of the columns."""
    guided = f"guidance {recipe.guidance:g}" if recipe.guidance > 1 else "no guidance"
    return (
        f"{recipe.model} with {recipe.weights} weights, {recipe.resolution} px, batch {recipe.batch}, {guided}, "
        f"{recipe.steps} steps. MACs are exact, of the denoiser. Times of {DENSE} are from the same interleaved run; "
        f"the noise floor is how far the interval of {DENSE} against itself reaches from 1; latency per MAC is the "
        "time's ratio / the MACs' ratio, at best 1. Peak memory is the denoiser's weights and what one call takes "
        "beyond what was held before it."
    )


def environment_line(row: Row) -> str:
    """Return a line with the versions and the system with which a row was measured."""
    here = row["environment"]
    names = {"torch": "torch", "diffusers": "diffusers", "cuda": "CUDA", "driver": "driver", "cudnn": "cuDNN"}
    versions = [f"{title} {here[name]}" for name, title in names.items() if here[name]]
    return ", ".join([*versions, f"{here['threads']} CPU threads of {here['cores']}", here["system"]])
