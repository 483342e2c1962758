"""The commands about recipes: run, resume, compare, plan, check."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from prunekit.cli.application import Engine, Overrides, Recipe, app, console, say
from prunekit.jobs.shipped import find_recipe, shipped_recipes
from prunekit.runtime.errors import UserError

PlannedPrecision = Literal["float32", "bfloat16", "float16"]


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    directory: Annotated[Path | None, typer.Option(help="Directory of the run; runs/NAME by default.")] = None,
) -> None:
    """Run a recipe; if its directory holds the same run, resume it."""
    recipe = find_recipe(recipe)
    from prunekit.jobs.process_count import process_count
    from prunekit.jobs.recipe import load_recipe
    from prunekit.jobs.run import start
    from prunekit.runtime.companions import companions
    from prunekit.runtime.termination import graceful

    with graceful(), companions(process_count(load_recipe(recipe, overrides or ()))):
        say(f"The run is in {start(recipe, overrides or (), directory)}")


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")], engine: Engine = None
) -> None:
    """Resume a stopped run; print the result of a finished one again."""
    from prunekit.jobs.process_count import process_count
    from prunekit.jobs.run import recorded, resume
    from prunekit.runtime.companions import companions
    from prunekit.runtime.engines import load_engine
    from prunekit.runtime.termination import graceful

    given = load_engine(engine or ())
    with graceful(), companions(process_count(recorded(directory, given))):
        say(f"The run is in {resume(directory, given)}")


@app.command()
def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...", help="Comparison recipes or directories, and settings as KEY=VALUE."
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Directory for cells and table; runs/NAME by default.")] = None,
) -> None:
    """Compare methods, budgets, seeds and protocols in one table; several processes may share the work."""
    paths = [Path(text) for text in recipes if "=" not in text]
    if not paths:
        raise UserError("nothing to compare: give a recipe with job: compare, or the directory of a comparison")
    paths = [path if path.is_dir() else find_recipe(path) for path in paths]
    overrides = [text for text in recipes if "=" in text]
    from prunekit.jobs.compare.comparing import compare
    from prunekit.jobs.process_count import process_count
    from prunekit.jobs.recipe import load_recipe
    from prunekit.runtime.companions import companions
    from prunekit.runtime.termination import graceful

    recipe = next((load_recipe(path, overrides) for path in paths if not path.is_dir()), None)
    with graceful(), companions(process_count(recipe)):
        folder = compare(paths, overrides, output)
    say(f"The table is in {folder / 'table.md'}, its charts in {folder / 'pareto.png'}")


@app.command()
def plan(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="Recipes, and settings as KEY=VALUE.")
    ],
    throughput: Annotated[
        float | None,
        typer.Option(help="Throughput of one device in TMAC/s; measured on this machine by default.", min=1e-6),
    ] = None,
    measure: Annotated[float, typer.Option(help="Duration of this measurement in seconds.", min=0.1)] = 1.0,
    devices: Annotated[int, typer.Option(help="Number of devices that share the work.", min=1)] = 1,
    precision: Annotated[
        PlannedPrecision | None,
        typer.Option(help="Meaning of precision=auto on these devices; that of this machine by default."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="File to write the plans to, in addition to the terminal."),
    ] = None,
) -> None:
    """Show the units, costs, memory, disk and time of recipes before they run, without weights or network."""
    given, overrides = _recipes_and_overrides(recipes)
    from prunekit.jobs.bench.bench_recipe import is_benchmark
    from prunekit.jobs.plan import Devices, plan_all
    from prunekit.jobs.plan.plan_table import show_plan, show_summary
    from prunekit.jobs.recipe import load_recipe
    from prunekit.runtime.files import write_json

    paths = [path for path in given if not is_benchmark(path)]
    for path in given:
        if path not in paths:
            say(f"{path} is a benchmark and prunes nothing; run it with: prunekit bench {path} --reduced")
    stated = None if throughput is None else throughput * 1e12
    made_for = Devices(devices, stated, measure, precision)
    plans = plan_all([load_recipe(path, overrides) for path in paths], made_for)
    for content in plans:
        show_plan(content, console())
        console().print()
    if len(plans) > 1:
        show_summary(plans, console())
    if json_file is not None:
        write_json(json_file, plans)
        say(f"The plans are in {json_file}")
    if len(plans) == 1:
        command = "compare" if plans[0]["job"] == "compare" else "run"
        say(f"Nothing was run. Start it with:\n  prunekit {command} {shlex.join(recipes)}")


def _recipes_and_overrides(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Split a command's arguments into recipes (YAML files or names of shipped recipes) and settings."""
    known = shipped_recipes()
    recipes = [text for text in arguments if text in known or Path(text).suffix == ".yaml" or Path(text).is_file()]
    if not recipes:
        first = next((text for text in arguments if "=" not in text), None)
        if first is not None:
            find_recipe(first)  # raises an error with the nearest name
        raise UserError("no recipe: give a recipe's YAML file, and after it settings as KEY=VALUE")
    return [find_recipe(text) for text in recipes], [text for text in arguments if text not in recipes]


@app.command()
def check(
    recipe: Recipe,
    overrides: Overrides = None,
    devices: Annotated[
        int, typer.Option(help="Number of devices that the recipe will run on; the check uses the share of one.", min=1)
    ] = 1,
) -> None:
    """Open a recipe's data and model, run one batch of each stage, and estimate the hours of the whole recipe."""
    recipe = find_recipe(recipe)
    from prunekit.jobs.check import check
    from prunekit.jobs.plan.plan_table import show_check, show_checked
    from prunekit.jobs.recipe import load_recipe

    terminal = console()
    content = check(load_recipe(recipe, overrides or ()), devices, lambda stage: show_checked(stage, terminal))
    show_check(content, terminal)
    say("Every stage works; nothing was kept")
