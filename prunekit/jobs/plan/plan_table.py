"""Plans on the terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from prunekit.jobs.recipe import precision_text
from prunekit.runtime.screen import print_table

NOT_KNOWN = "–"
DENSE_AND_CUT, TIMES = ("MACs dense", "MACs at most", "experts"), ("device-hours", "wall-clock time")  # of a summary
Lines = list[list[str]]


def show_plan(plan: dict[str, Any], console: Console) -> None:
    """Print a plan that `prunekit.jobs.plan.plan` returned."""
    model = plan["model"]
    sides = {key: f"{model[key][0]} x {model[key][1]}" for key in ("resolution", "training_resolution")}
    _say(
        console,
        f"{plan['recipe']} ({plan['job']}): {model['unet']} of {model['name']}, "
        f"{quantity(model['params']).strip()} parameters, {quantity(model['macs'])}MACs; "
        f"used at {sides['resolution']}, trained at {sides['training_resolution']} pixels, "
        f"{model['text_length']} text tokens",
    )
    if "units" in plan:
        kinds = (f"{kind} {row['units']:,} in {row['groups']:,} groups" for kind, row in plan["units"].items())
        total = sum(row["units"] for row in plan["units"].values())
        _say(console, f"{total:,} units: {', '.join(kinds)}")
        _show_methods(plan["methods"], console)
        _say(console, "* estimate: parameters where every layer gives up the same share; what is chosen will differ")
    _show_work(plan, console)
    _say(console, f"Precision: {precision_text(plan['precision'])}")
    _say(console, f"Speed of a device: {quantity(plan['speed']['macs_per_second'])}MACs/s, {plan['speed']['how']}")
    print_table(console, ["memory and disk", "size"], _sizes(plan), ["size"], "sizes", strong_end=True)
    _say(console, f"Memory counts {plan['memory']['how']}")
    if data := plan["disk"].get("data"):
        _say(console, f"Data: {data['images']:,} images, {data['captions']:,} captions, {data['source']}")


def show_summary(plans: Sequence[dict[str, Any]], console: Console) -> None:
    """Print two tables with one line per plan: the models, and the resources that the recipe takes."""
    models, takes = [], []
    for plan in plans:
        rows = list(plan.get("methods", {}).values())
        stage, peak = max(plan["memory"]["peak"].items(), key=lambda item: item[1])
        dense = _each(f"{row['dense_macs']:,}" for row in rows) or f"{plan['model']['macs']:,}"
        at_most, experts = _each(f"{row['target_macs']:,}" for row in rows), _each(str(row["experts"]) for row in rows)
        models.append([plan["recipe"], dense, at_most or NOT_KNOWN, experts or NOT_KNOWN])
        known = plan["disk"].get("encoded", {}) is not None
        takes.append(
            [
                plan["recipe"],
                f"{in_bytes(peak)} ({stage})",
                in_bytes(plan["disk"]["total"]) + ("" if known else " + data"),
                three_figures(plan["gpu_hours"]),
                duration(plan["wall_seconds"]),
            ]
        )
    print_table(console, ["recipe", *DENSE_AND_CUT], models, DENSE_AND_CUT, "all plans: models")
    title = f"all plans: what they take on {plans[0]['devices']} device(s)"
    print_table(console, ["recipe", "memory, largest stage", "disk", *TIMES], takes, TIMES, title)


def show_checked(stage: Any, console: Console) -> None:
    """Print a stage that `prunekit.jobs.check` has just finished."""
    console.print(f"ok  {stage.stage}: {duration(stage.seconds)}, peak memory {in_bytes(stage.peak_bytes)}")


def show_check(content: dict[str, Any], console: Console) -> None:
    """Print the precisions of a check, and the hours that it estimated for the whole recipe."""
    for line in content["precision"]:
        _say(console, line)
    _show_work(content, console)
    _say(console, "Estimated from the batches above, by the multiply-adds of each stage; without evaluation")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False)


def _each(values: Iterable[str]) -> str:
    return "\n".join(dict.fromkeys(values))


def _show_methods(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """Print one table per way of counting costs, each followed by a line with the dense costs and the convention."""
    tables: dict[str, Lines] = {}
    for name, row in rows.items():
        height, width = row["sample_size"]
        of_time = row["budget_of"] == "time"
        dense = (
            f"dense: {row['dense_macs']:,} MACs, {quantity(row['dense_params']).strip()} parameters; "
            f"lowest possible budget {row['floor']:.4f}; MACs are {row['convention']}, "
            f"latent {height} x {width}, {row['text_length']} tokens"
        )
        tables.setdefault(dense, []).append(
            [
                name,
                str(row["experts"]),
                f"{row['budget']:g}" + (" of the time" if of_time else ""),
                ("about " if of_time else "") + f"{row['target_macs']:,}",
                quantity(row["params_estimate"]).strip(),
            ]
        )
    numeric = ("experts", "budget", "MACs at most", "parameters *")
    for number, (dense, lines) in enumerate(tables.items()):
        print_table(console, ["method", *numeric], lines, numeric, "before and after" if number == 0 else "")
        _say(console, dense)


def _show_work(plan: dict[str, Any], console: Console) -> None:
    """Print the stages, their total time, and the passes of each sample."""
    numeric = ("samples", "MACs", "time, about")
    lines: Lines = []
    for row in plan["work"]:
        macs = NOT_KNOWN if row["macs"] is None else quantity(row["macs"])
        seconds = NOT_KNOWN if row["seconds"] is None else duration(row["seconds"])
        lines.append([row["stage"], f"{row['samples']:,}", macs.strip(), seconds])
    lines.append(["all", "", "", duration(plan["seconds"])])
    print_table(console, ["stage", *numeric], lines, numeric, "work", strong_end=True)
    total = f"All: {three_figures(plan['gpu_hours'])} device-hours"
    if plan["devices"] > 1:
        total += f"; {duration(plan['wall_seconds'])} on {plan['devices']} devices"
    _say(console, total)
    _say(console, "Passes of each sample:")
    for title, passes in _passes(plan["work"]):
        _say(console, f"- {title}: {passes}")


def _passes(work: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return pairs (stages, passes of a sample): one per kind of stage, or several if its rows differ in passes."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for row in work:
        name, _, kind = row["stage"].rpartition(": ")
        kinds.setdefault(kind, {}).setdefault(row["passes"], []).append(name)
    found = []
    for kind, alike in kinds.items():
        for passes, names in alike.items():
            found.append((kind if len(alike) == 1 else f"{kind} of {', '.join(names)}", passes))
    return found


DISK = {
    "experts": "disk: experts *",
    "snapshots": "disk: experts at evaluation.at_steps *",
    "checkpoints": "disk: checkpoints of the training under way, at most",
    "milestones": "disk: denoisers of the milestones, float16",
    "samples": "disk: generated pictures, before compression",
}
ENCODED = {"latents": "latents", "text": "text states", "prompts": "prompt embeddings", "pooled": "pooled text"}


def _sizes(plan: dict[str, Any]) -> Lines:
    lines: Lines = []
    memory, disk = plan["memory"], plan["disk"]
    for key, label in (("dense_weights", "dense denoiser"), ("expert_weights", "largest expert *")):
        for dtype, size in memory.get(key, {}).items():
            lines.append([f"{label}, {dtype}", in_bytes(size)])
    for stage, size in memory["peak"].items():
        lines.append([f"peak of {stage}, each device (estimate)", in_bytes(size)])
    for key, label in DISK.items():
        if disk.get(key):
            lines.append([label, in_bytes(disk[key])])
    if "encoded" in disk and disk["encoded"] is None:
        lines.append(["disk: encoded data (not known before the data is read)", NOT_KNOWN])
    for key, size in (disk.get("encoded") or {}).items():
        if size:
            lines.append([f"disk: encoded data, {ENCODED[key]}", in_bytes(size)])
    return [*lines, ["disk: all", in_bytes(disk["total"])]]


def three_figures(value: float) -> str:
    """Return a number with three significant figures and no exponent, unless it is tiny: "164,000", "0.255"."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 1000 else f"{value:.3g}"


def quantity(value: float) -> str:
    """Return a number with a decimal prefix, to be followed by a unit: "1.07 T", or "5 " without a prefix."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{three_figures(value / factor)} {prefix}"
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
            return f"{three_figures(seconds / factor)} {unit}"
    return f"{seconds:.2g} s"
