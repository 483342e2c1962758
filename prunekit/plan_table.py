"""A plan on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

NOT_KNOWN = "–"


def show_plan(plan: dict[str, Any], console: Console) -> None:
    """Print what `prunekit.plan.plan` returned."""
    model = plan["model"]
    sides = {key: f"{model[key][0]} x {model[key][1]}" for key in ("resolution", "training_resolution")}
    macs = f", {quantity(model['macs'])}MACs" if "macs" in model else ""
    console.print(
        f"{plan['recipe']} ({plan['job']}): {model['unet']} of {model['name']}, "
        f"{quantity(model['params']).strip()} parameters"
        f"{macs}; used at {sides['resolution']}, trained at {sides['training_resolution']} pixels, "
        f"{model['text_length']} text tokens"
    )
    if "units" in plan:
        kinds = (f"{kind} {row['units']:,} in {row['groups']:,} groups" for kind, row in plan["units"].items())
        total = sum(row["units"] for row in plan["units"].values())
        console.print(f"{total:,} units: {', '.join(kinds)}")
        console.print(_methods(plan["methods"]))
        console.print("* estimate: parameters where every layer gives up the same share; what is chosen will differ")
    console.print(_work(plan))
    console.print(f"Speed: {quantity(plan['speed']['macs_per_second'])}MACs/s, {plan['speed']['how']}")
    console.print(_sizes(plan))
    console.print(f"Memory counts {plan['memory']['how']}")


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
            f"{row['budget']:g}",
            f"{row['floor']:.4f}",
            f"{row['dense_macs']:,}",
            f"{row['target_macs']:,}",
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
    table.add_row("all", "", "", duration(plan["seconds"]), "", style="bold")
    return table


def _sizes(plan: dict[str, Any]) -> Table:
    table = Table("memory and disk", "", title="sizes", title_justify="left")
    table.columns[1].justify = "right"
    memory, disk = plan["memory"], plan["disk"]
    for key, label in (("dense_weights", "dense UNet"), ("expert_weights", "largest expert *")):
        for dtype, size in memory.get(key, {}).items():
            table.add_row(f"{label}, {dtype}", in_bytes(size))
    for stage, size in memory["training_peak"].items():
        table.add_row(f"peak of training, {stage} (estimate)", in_bytes(size))
    labels = {
        "experts": "disk: experts, float32 *",
        "checkpoints": "disk: checkpoints of the training under way, at most",
        "milestones": "disk: UNets of the milestones, float16",
        "samples": "disk: generated pictures, before compression",
        "encoded_cache": "disk: encoded data",
    }
    for key, size in disk.items():
        if key in labels:
            table.add_row(labels[key], "not known before the data is read" if size is None else in_bytes(size))
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
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Return a time in its largest fitting unit."""
    for factor, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.2g} s"
