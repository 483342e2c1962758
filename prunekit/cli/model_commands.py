"""The commands about models, methods and shipped recipes: units, macs, methods, recipes."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.application import Model, app, console, print_table, say
from prunekit.jobs.shipped import copy_recipe, shipped_recipes, summary
from prunekit.runtime.errors import UserError

recipes = typer.Typer(help="List the recipes that ship with prunekit, or copy one.", invoke_without_command=True)


@app.command()
def units(
    model: Model,
    depth: Annotated[str, typer.Option(help="Whole layers that are units: aptp, all, blocks or none.")] = "aptp",
    include: Annotated[list[str] | None, typer.Option(help="Glob over module paths to include (repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob over module paths to exclude (repeatable).")] = None,
) -> None:
    """List the groups of units that prunekit can remove from a model."""
    from prunekit.core.discovery import discover
    from prunekit.models import load_shape

    unet = load_shape(model).denoiser
    space = discover(unet, depth, include, exclude)
    numeric = ("units", "channels per unit")
    lines = [[group.kind, group.path, str(group.size), str(group.channels)] for group in space.groups]
    print_table(["kind", "path", *numeric], lines, numeric)
    sizes = f"{space.num_width:,} width + {space.num_depth:,} depth = {space.size:,} units"
    say(f"{type(unet).__name__} of {model}, depth={depth}: {sizes} in {len(space.groups):,} groups")


@app.command()
def macs(
    model: Model,
    size: Annotated[str | None, typer.Option(help="Latent side, or HxW; the model's own by default.")] = None,
    text_length: Annotated[
        int | None, typer.Option(help="Number of text tokens; the tokenizer's maximum by default.", min=1)
    ] = None,
    convention: Annotated[
        str, typer.Option(help="Convention of the count: exact, conv_linear or aptp (docs/units.md).")
    ] = "exact",
    check: Annotated[
        bool, typer.Option("--check", help="Compare the count with FlopCounterMode, thop and fvcore.")
    ] = False,
) -> None:
    """Count a model's MACs and parameters, exactly."""
    from prunekit.core.cost import CostModel
    from prunekit.core.discovery import discover
    from prunekit.models import load_shape

    shape = load_shape(model)
    length = text_length or shape.text_length
    cost = CostModel(shape.denoiser, discover(shape.denoiser, "none"), _latent_size(size), length, convention)
    height, width = cost.sample_size
    say(f"{type(shape.denoiser).__name__} of {model}: {cost.dense_params:,} parameters")
    say(f"{cost.dense_macs:,} MACs ({convention}, latent {height} x {width}, {length} text tokens, batch 1)")
    if check:
        _check(shape.denoiser, cost.sample_size, length)


def _check(unet: Any, size: tuple[int, int], text_length: int) -> None:
    from prunekit.measuring.crosscheck import crosscheck

    numeric = ("latent", "MACs", "exact MACs", "difference", "unexplained")
    rows, lines = crosscheck(unet, size, text_length), []
    for row in rows:
        numbers = (row.macs, row.ours, row.difference, row.unexplained)
        shown = [f"{number:,}" if number is not None else "–" for number in numbers]
        lines.append([row.counter, "{} x {}".format(*row.sample_size), *shown, row.explanation])
    print_table(["counter", *numeric, "what explains it"], lines, numeric)
    if wrong := [row.counter for row in rows if row.unexplained]:
        raise UserError(f"the counts of {', '.join(wrong)} differ in a way that is not explained; please report this")
    say("Every difference is explained to the integer")


@app.command()
def methods(
    chosen: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Methods whose settings to list.")
    ] = None,
) -> None:
    """List the pruning methods; with NAMEs, list the settings of these methods."""
    from prunekit.methods.registry import describe, get, names

    terminal = console()
    if not chosen:
        for name, summary in describe().items():
            terminal.print(f"[bold]{name}[/bold]: {summary}")
        say(f"List a method's settings with: prunekit methods {names()[0]}")
        say("Methods of other packages register in the entry-point group prunekit.methods")
        return
    kinds = {name: get(name) for name in chosen}
    from prunekit.methods import PruneSettings

    for name, method in kinds.items():
        terminal.print(f"{name}: {(method.__doc__ or '').strip().splitlines()[0]}", style="bold", highlight=False)
        _settings(method.Config, PruneSettings)
    terminal.print("All methods share these, in the recipe's section `prune`:", style="bold")
    _settings(PruneSettings, None)


def _settings(config: Any, without: Any) -> None:
    lines = []
    for key, field in config.model_fields.items():
        if without is None or key not in without.model_fields:
            default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
            lines.append([key, default, field.description or ""])
    if lines:
        print_table(["setting", "default", "what it is"], lines)


def _default(value: Any) -> str:
    dump = getattr(value, "model_dump", None)
    if dump is None:
        return str(value)
    return ", ".join(f"{key}={setting}" for key, setting in dump(exclude_unset=True).items())


def _latent_size(size: str | None) -> int | tuple[int, int] | None:
    if size is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size.strip().lower())
    if match is None or "0" in (match[1], match[2]):
        raise UserError(f"--size {size}: give the latent's side, such as 64, or HxW, such as 64x96")
    height = int(match[1])
    return (height, int(match[2])) if match[2] else height


app.add_typer(recipes, name="recipes")


@recipes.callback()
def show(context: typer.Context) -> None:
    """List the recipes that ship with prunekit; `prunekit run NAME` and `prunekit compare NAME` run them."""
    if context.invoked_subcommand is not None:
        return
    terminal = console()
    for name, path in shipped_recipes().items():
        terminal.print(f"[bold]{name}[/bold]: {summary(path)}")
    say("Run one with: prunekit run NAME; copy one to change it with: prunekit recipes copy NAME [PATH]")


@recipes.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.")],
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[PATH]", help="File or directory to copy to; the working directory by default."),
    ] = None,
) -> None:
    """Copy a shipped recipe together with the files that it extends."""
    for written in copy_recipe(name, path):
        say(f"{written} was written")
