"""Plans on the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from prunekit.jobs.recipe import precision_text

NOT_KNOWN = "–"


def show_plan(plan: dict[str, Any], console: Console) -> None:
    """Print what `prunekit.jobs.plan.plan` returned."""
    model = plan["model"]
    sides = {key: f"{model[key][0]} x {model[key][1]}" for key in ("resolution", "training_resolution")}
    console.print(
        f"{plan['recipe']} ({plan['job']}): {model['unet']} of {model['name']}, "
        f"{quantity(model['params']).strip()} parameters, {quantity(model['macs'])}MACs; "
        f"used at {sides['resolution']}, trained at {sides['training_resolution']} pixels, "
        f"{model['text_length']} text tokens"
    )
    if "units" in plan:
        kinds = (f"{kind} {row['units']:,} in {row['groups']:,} groups" for kind, row in plan["units"].items())
        total = sum(row["units"] for row in plan["units"].values())
        console.print(f"{total:,} units: {', '.join(kinds)}")
        console.print(_methods(plan["methods"]))
        console.print("* estimate: parameters where every layer gives up the same share; what is chosen will differ")
    console.print(_work(plan))
    console.print(f"Precision: {precision_text(plan['precision'])}")
    console.print(f"Speed of a device: {quantity(plan['speed']['macs_per_second'])}MACs/s, {plan['speed']['how']}")
    console.print(_sizes(plan))
    console.print(f"Memory counts {plan['memory']['how']}")
    if data := plan["disk"].get("data"):
        console.print(f"Data: {data['images']:,} images, {data['captions']:,} captions, {data['source']}")


def show_summary(plans: Sequence[dict[str, Any]], console: Console) -> None:
    """Print one line for each plan."""
    table = Table("recipe", title="all plans", title_justify="left")
    for column in ("MACs dense", "MACs at most", "experts", "memory, largest stage", "disk", "GPU-hours", "wall-clock"):
        table.add_column(column, justify="right")
    for plan in plans:
        rows = list(plan.get("methods", {}).values())
        stage, peak = max(plan["memory"]["peak"].items(), key=lambda item: item[1])
        table.add_row(
            plan["recipe"],
            _each(f"{row['dense_macs']:,}" for row in rows) or f"{plan['model']['macs']:,}",
            _each(f"{row['target_macs']:,}" for row in rows),
            _each(str(row["experts"]) for row in rows),
            f"{in_bytes(peak)} ({stage})",
            in_bytes(plan["disk"]["total"]) + ("" if plan["disk"].get("encoded", {}) is not None else " + data"),
            f"{plan['gpu_hours']:,.3g}",
            f"{duration(plan['wall_seconds'])} on {plan['devices']}",
        )
    console.print(table)


def show_checked(stage: Any, console: Console) -> None:
    """Print a stage that `prunekit.jobs.check` saw through, as soon as it has."""
    console.print(f"ok  {stage.stage}: {duration(stage.seconds)}, peak memory {in_bytes(stage.peak_bytes)}")


def show_check(content: dict[str, Any], console: Console) -> None:
    """Print the precisions of a check, and the hours that it estimated for the whole recipe."""
    for line in content["precision"]:
        console.print(line, markup=False)
    console.print(_work(content))
    console.print("Estimated from the batches above, by the multiply-adds of each stage; without evaluation")


def _each(values: Any) -> str:
    return "\n".join(dict.fromkeys(values))


def _methods(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table("method", title="before and after", title_justify="left")
    columns = (
        "experts",
        "budget",
        "floor",
        "MACs dense",
        "MACs at most",
        "parameters dense",
        "parameters *",
        "MACs of",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "MACs of" else "right")
    for name, row in rows.items():
        height, width = row["sample_size"]
        table.add_row(
            name,
            str(row["experts"]),
            f"{row['budget']:g}" + (" of the time" if row["budget_of"] == "time" else ""),
            f"{row['floor']:.4f}",
            f"{row['dense_macs']:,}",
            ("about " if row["budget_of"] == "time" else "") + f"{row['target_macs']:,}",
            quantity(row["dense_params"]),
            quantity(row["params_estimate"]),
            f"{row['convention']}, latent {height} x {width}, {row['text_length']} tokens",
        )
    return table


def _work(plan: dict[str, Any]) -> Table:
    table = Table("stage", title="work", title_justify="left")
    for column in ("samples", "MACs", "estimated time"):
        table.add_column(column, justify="right")
    table.add_column("of each sample")
    for row in plan["work"]:
        macs = NOT_KNOWN if row["macs"] is None else quantity(row["macs"])
        seconds = NOT_KNOWN if row["seconds"] is None else duration(row["seconds"])
        table.add_row(row["stage"], f"{row['samples']:,}", macs, seconds, row["passes"])
    total = f"{plan['gpu_hours']:.3g} device-hours"
    if plan["devices"] > 1:
        total += f"; {duration(plan['wall_seconds'])} on {plan['devices']} devices"
    table.add_row("all", "", "", duration(plan["seconds"]), total, style="bold")
    return table


DISK = {
    "experts": "disk: experts *",
    "snapshots": "disk: experts at evaluation.at_steps *",
    "checkpoints": "disk: checkpoints of the training under way, at most",
    "milestones": "disk: denoisers of the milestones, float16",
    "samples": "disk: generated pictures, before compression",
}
ENCODED = {"latents": "latents", "text": "text states", "prompts": "prompt embeddings", "pooled": "pooled text"}


def _sizes(plan: dict[str, Any]) -> Table:
    table = Table("memory and disk", "", title="sizes", title_justify="left")
    table.columns[1].justify = "right"
    memory, disk = plan["memory"], plan["disk"]
    for key, label in (("dense_weights", "dense denoiser"), ("expert_weights", "largest expert *")):
        for dtype, size in memory.get(key, {}).items():
            table.add_row(f"{label}, {dtype}", in_bytes(size))
    for stage, size in memory["peak"].items():
        table.add_row(f"peak of {stage}, each device (estimate)", in_bytes(size))
    for key, label in DISK.items():
        if disk.get(key):
            table.add_row(label, in_bytes(disk[key]))
    if "encoded" in disk and disk["encoded"] is None:
        table.add_row("disk: encoded data", "not known before the data is read")
    for key, size in (disk.get("encoded") or {}).items():
        if size:
            table.add_row(f"disk: encoded data, {ENCODED[key]}", in_bytes(size))
    table.add_row("disk: all", in_bytes(disk["total"]), style="bold")
    return table


def quantity(value: float) -> str:
    """Return a number with its decimal prefix, with a blank at the end before the unit: "1.07 T"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}" if value < 1e18 else f"{value:.2e} "
    return f"{value:.3g} "


def in_bytes(value: float) -> str:
    """Return a size in binary units."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            amount = value / factor
            return f"{amount:.0f} {unit}" if amount >= 1000 else f"{amount:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Return a time in its largest fitting unit."""
    for factor, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.2g} s"
