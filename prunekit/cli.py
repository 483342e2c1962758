"""The commands: parse, call, print. A user's mistake is one line on stderr; anything else shows its traceback."""

import importlib
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

INTERRUPTED = 130
MOST_ROWS = 50  # of pictures that `generate` lists
UsageError, ClickException = typer.BadParameter.__mro__[1:3]  # of click, which newer typers carry inside


class Commands(TyperGroup):
    """The group that turns errors into one line and an exit status."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command line; always leaves by SystemExit."""
        given = extra.get("args")
        arguments = list(sys.argv[1:] if given is None else given)
        debug = "--debug" in arguments or os.environ.get("PRUNEKIT_DEBUG", "") not in ("", "0")
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except ClickException as error:
            hint = f" (see `{error.ctx.command_path} --help`)" if isinstance(error, UsageError) and error.ctx else ""
            _fail(error.format_message() + hint, error.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            _interrupted()
        except Exception as error:
            if debug or not is_users(error):
                raise
            _fail(str(error) or type(error).__name__, 1)
        if status == INTERRUPTED:
            _interrupted()
        sys.exit(status if isinstance(status, int) else 0)


def is_users(error: Exception) -> bool:
    """Whether the message is for the user: an error class of ours, a ValueError that our code raised, or a file's."""
    if type(error).__module__.partition(".")[0] == __package__ or isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError | ImportError):
        return False
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == __package__


def _fail(message: str, status: int) -> None:
    typer.echo(f"prunekit: {' '.join(message.split())}", err=True)
    sys.exit(status)


def _interrupted() -> None:
    _fail("interrupted; what is finished stays: `prunekit resume RUN` goes on with a run", INTERRUPTED)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe's YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings to change, such as fine_tune.steps=100")
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help='"emoji", a diffusers directory, sd-1.4, sd-1.5, sd-2.1, sdxl, …')
]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of every error")] = False,
) -> None:
    """Prune text-to-image diffusion UNets, recover them, and route prompts to pruned experts."""
    for library in ("transformers", "diffusers"):
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")
        if library in sys.modules:  # then it has read its variable already
            importlib.import_module(f"{library}.utils.logging").set_verbosity_error()


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    directory: Annotated[Path | None, typer.Option(help="the run's directory; runs/NAME by default")] = None,
) -> None:
    """Run a recipe; where its directory holds the same run, go on with it."""
    from prunekit.run import start
    from prunekit.training.termination import graceful

    with graceful():
        _say(f"The run is in {start(recipe, overrides or (), directory)}")


@app.command()
def resume(directory: Annotated[Path, typer.Argument(metavar="RUN", help="a run's directory")]) -> None:
    """Go on with a run that was stopped; a finished one is shown again."""
    from prunekit.run import resume
    from prunekit.training.termination import graceful

    with graceful():
        _say(f"The run is in {resume(directory)}")


@app.command()
def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="comparison recipes or directories, and settings"),
    ],
    output: Annotated[Path | None, typer.Option(help="where cells and table go; runs/NAME by default")] = None,
) -> None:
    """Compare methods x budgets x seeds x protocols in one fair table; several processes may share the work."""
    from prunekit.compare.comparison import compare
    from prunekit.training.termination import graceful

    paths = [text for text in recipes if "=" not in text]
    if not paths:
        raise ValueError("nothing to compare: give a recipe with job: compare, or a comparison's directory")
    with graceful():
        folder = compare(paths, [text for text in recipes if "=" in text], output)
    _say(f"The table is in {folder / 'table.md'}, its picture in {folder / 'pareto.png'}")


@app.command()
def plan(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="recipes' YAML files, and settings")
    ],
    throughput: Annotated[
        float | None, typer.Option(help="a device's TMAC/s; measured on this machine where it is not given", min=1e-6)
    ] = None,
    measure: Annotated[float, typer.Option(help="seconds of that measurement", min=0.1)] = 1.0,
    devices: Annotated[int, typer.Option(help="how many devices share the work", min=1)] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="also write the plans there")] = None,
) -> None:
    """Show what recipes will cut, cost and take, without weights or network."""
    from prunekit.benchmark.config import is_benchmark
    from prunekit.plan import Devices, plan_all
    from prunekit.plan.table import show_plan, show_summary
    from prunekit.recipe import load_recipe
    from prunekit.training.checkpoint import write_json

    given, overrides = _recipes_and_overrides(recipes)
    paths = [path for path in given if not is_benchmark(path)]
    for path in given:
        if path not in paths:
            _say(f"{path} is a benchmark, which prunes nothing; try it with: prunekit bench {path} --reduced")
    made_for = Devices(devices, None if throughput is None else throughput * 1e12, measure)
    plans = plan_all([load_recipe(path, overrides) for path in paths], made_for)
    for content in plans:
        show_plan(content, _console())
        _console().print()
    if len(plans) > 1:
        show_summary(plans, _console())
    if json_file is not None:
        write_json(json_file, plans)
        _say(f"The plans are in {json_file}")
    if len(plans) == 1:
        command = "compare" if plans[0]["job"] == "compare" else "run"
        _say(f"Nothing was run; start it with: prunekit {command} {' '.join([*paths, *overrides])}")


def _recipes_and_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Part a command's arguments into recipes, which are YAML files, and settings."""
    paths = [text for text in arguments if "=" not in text and (Path(text).suffix == ".yaml" or Path(text).is_file())]
    if not paths:
        raise ValueError("no recipe: give a recipe's YAML file, and after it settings as KEY=VALUE")
    return paths, [text for text in arguments if text not in paths]


@app.command()
def check(
    recipe: Recipe,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(help="how many devices the recipe will run on; one is tried", min=1)] = 1,
) -> None:
    """Open a recipe's data and model, run one batch of each stage, and estimate the hours of the whole."""
    from prunekit.check import check
    from prunekit.plan.table import show_check, show_checked
    from prunekit.recipe import load_recipe

    console = _console()
    content = check(load_recipe(recipe, overrides or ()), devices, lambda stage: show_checked(stage, console))
    show_check(content, console)
    _say("Every stage works; nothing was kept")


@app.command()
def units(
    model: Model,
    depth: Annotated[str, typer.Option(help="which whole layers are units: aptp, all, blocks or none")] = "aptp",
    include: Annotated[list[str] | None, typer.Option(help="glob over module paths: only these (repeatable)")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="glob over module paths: not these (repeatable)")] = None,
) -> None:
    """List what can be removed from a model."""
    from rich.table import Table

    from prunekit.models import load_shape
    from prunekit.units import discover

    unet = load_shape(model).unet
    space = discover(unet, depth, include, exclude)
    table = Table("kind", "path")
    for column in ("units", "channels a unit"):
        table.add_column(column, justify="right")
    for group in space.groups:
        table.add_row(group.kind, group.path, str(group.size), str(group.channels))
    _console().print(table)
    sizes = f"{space.num_width:,} width + {space.num_depth:,} depth = {space.size:,} units"
    _say(f"{type(unet).__name__} of {model}, depth={depth}: {sizes} in {len(space.groups):,} groups")


@app.command()
def macs(
    model: Model,
    size: Annotated[str | None, typer.Option(help="latent side, or HxW; the model's own by default")] = None,
    text_length: Annotated[int | None, typer.Option(help="text tokens; the tokenizer's by default", min=1)] = None,
    convention: Annotated[str, typer.Option(help="exact, conv_linear or aptp")] = "exact",
    check: Annotated[bool, typer.Option("--check", help="count with FlopCounterMode, thop and fvcore too")] = False,
) -> None:
    """Count a model's MACs and parameters, exactly."""
    from prunekit.cost import CostModel
    from prunekit.models import load_shape
    from prunekit.units import discover

    shape = load_shape(model)
    length = text_length or shape.tokenizer.model_max_length
    cost = CostModel(shape.unet, discover(shape.unet, "none"), _latent_size(size), length, convention)
    height, width = cost.sample_size
    _say(f"{type(shape.unet).__name__} of {model}: {cost.dense_params:,} parameters")
    _say(f"{cost.dense_macs:,} MACs ({convention}, latent {height} x {width}, {length} text tokens, batch 1)")
    if check:
        _check(shape.unet, cost.sample_size, length)


def _check(unet: Any, size: tuple[int, int], text_length: int) -> None:
    from rich.table import Table

    from prunekit.crosscheck import crosscheck

    table = Table("counter")
    for column in ("latent", "MACs", "exact MACs", "difference", "unexplained"):
        table.add_column(column, justify="right")
    table.add_column("what explains it")
    rows = crosscheck(unet, size, text_length)
    for row in rows:
        numbers = (f"{number:,}" if number is not None else "–" for number in (row.macs, row.ours))
        rest = (f"{number:,}" if number is not None else "–" for number in (row.difference, row.unexplained))
        table.add_row(row.counter, "{} x {}".format(*row.sample_size), *numbers, *rest, row.explanation)
    _console().print(table)
    if wrong := [row.counter for row in rows if row.unexplained]:
        raise ValueError(f"the counts of {', '.join(wrong)} differ by more than what is known; please report this")
    _say("Every difference is explained to the integer")


@app.command()
def methods() -> None:
    """List the pruning methods and their settings."""
    from prunekit.methods import PruneSettings, get, names

    console = _console()
    for name in names():
        method = get(name)
        console.print(f"{name}: {(method.__doc__ or '').strip().splitlines()[0]}", style="bold", highlight=False)
        _settings(console, method.Config, PruneSettings)
    console.print("All methods share these, in the recipe's section `prune`:", style="bold")
    _settings(console, PruneSettings, None)
    _say("A method of another package registers in the entry-point group prunekit.methods")


def _settings(console: Any, config: Any, without: Any) -> None:
    from rich.table import Table

    table = Table("setting", "default", "what it is")
    for key, field in config.model_fields.items():
        if without is None or key not in without.model_fields:
            default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
            table.add_row(key, default, field.description or "")
    if table.row_count:
        console.print(table)


def _default(value: Any) -> str:
    dump = getattr(value, "model_dump", None)
    if dump is None:
        return str(value)
    return ", ".join(f"{key}={setting}" for key, setting in dump(exclude_unset=True).items())


@app.command()
def generate(
    directory: Annotated[
        Path, typer.Argument(metavar="RUN", help="a run's directory, an export, or any diffusers pipeline")
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="a prompt (repeatable)")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="a text file with a prompt a line")] = None,
    prompt_list: Annotated[
        str | None, typer.Option("--list", help="a shipped list: aptp-cc3m, aptp-coco, aptp-parti")
    ] = None,
    validation: Annotated[
        int | None, typer.Option(help="the first N captions that the run's training did not see", min=1)
    ] = None,
    extremes: Annotated[
        int | None, typer.Option(help="of those captions, N of the cheapest expert and N of the dearest", min=1)
    ] = None,
    method: Annotated[str, typer.Option(help="whose pruned model")] = "aptp",
    seed: Annotated[int, typer.Option(help="of every prompt's noise", min=0)] = 0,
    negative_prompt: Annotated[str | None, typer.Option(help="what guidance leads away from")] = None,
    steps: Annotated[int, typer.Option(help="scheduler steps", min=1)] = 25,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; the recipe's by default", min=0)] = None,
    batch_size: Annotated[int, typer.Option(help="pictures of one pipeline call", min=1)] = 1,
    max_resident: Annotated[int | None, typer.Option(help="experts in memory at once; all by default", min=1)] = None,
    picture_format: Annotated[str, typer.Option("--format", help="png or webp, both without loss")] = "png",
    output: Annotated[Path | None, typer.Option(help="where pictures go; RUN/generated/METHOD by default")] = None,
) -> None:
    """Draw prompts, each by the expert that serves it; several processes may share the work, and it can be resumed."""
    from rich.table import Table

    from prunekit.serving import PromptRoutedPipeline
    from prunekit.serving.bulk import Request, generate_to
    from prunekit.serving.prompts import collect

    given = {"prompts": prompt or (), "file": prompts_file, "shipped": prompt_list}
    pipeline = PromptRoutedPipeline.from_pretrained(directory, method, max_resident=max_resident)
    pipeline.set_progress_bar_config(disable=True)
    prompts = collect(pipeline, directory, **given, validation=validation, extremes=extremes)
    drawn_by = (steps, guidance, negative_prompt, None, batch_size, picture_format)
    method = pipeline.mixture.info.get("method", method)
    folder = output or directory / "generated" / method
    made = generate_to(folder, pipeline, Request(prompts, [seed] * len(prompts), *drawn_by))
    table = Table("picture", "expert", "prompt")
    for text, (path, expert) in list(zip(prompts, made, strict=True))[:MOST_ROWS]:
        table.add_row(path.name, str(expert), text[:100])
    _console().print(table)
    of = f"by {method} ({pipeline.num_experts} experts), seed {seed}"
    _say(f"{len(prompts)} pictures {of}, are in {folder}")


@app.command()
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET... [KEY=VALUE]...",
            help="runs, diffusers directories, hub ids or emoji; and settings of the protocol",
        ),
    ],
    protocol: Annotated[str, typer.Option(help="emoji, aptp or bksdm: how pictures are made and measured")] = "emoji",
    data: Annotated[
        str | None,
        typer.Option(help='emoji, a folder, a recipe, or "{kind: coco, path: coco, split: val30k}"; a run\'s own'),
    ] = None,
    images: Annotated[int | None, typer.Option(help="of each model; the protocol's by default", min=2)] = None,
    output: Annotated[
        Path | None, typer.Option(help="where pictures and table go; runs/evaluate-PROTOCOL by default")
    ] = None,
) -> None:
    """Measure runs and any diffusers pipelines under one protocol; processes may share the work, and it resumes."""
    from prunekit.evaluation.command import TABLE, evaluate
    from prunekit.evaluation.table import terminal_table
    from prunekit.training.termination import graceful

    places, overrides = [t for t in targets if "=" not in t], [t for t in targets if "=" in t]
    with graceful():
        done = evaluate(places, protocol, data, images, overrides, output, _say)
    console = _console()
    console.print(terminal_table(*done.shown(), f"protocol {protocol}", console.width))
    _say(f"The table is in {done.folder / TABLE}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="directories of runs and comparisons")],
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="first measure each layer's damage, and what an older run lacks")
    ] = False,
) -> None:
    """Write one HTML page a run or comparison: figures, pictures, architectures, routing, training, trust."""
    from prunekit.report.command import report

    for path in report(runs, sensitivity, _say):
        _say(f"The report is {path}")


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|UNET", help="a run, a pipeline's directory, or a UNet's folder")
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="where it goes; new or empty")],
    tier: Annotated[
        str, typer.Option(help="stock, class, onnx, torch; auto: stock where it expresses the cut, else class")
    ] = "auto",
    method: Annotated[str, typer.Option(help="of a run: whose pruned model")] = "aptp",
    expert: Annotated[int | None, typer.Option(help="of a mixture: this expert alone", min=0)] = None,
    batch: Annotated[int | None, typer.Option(help="onnx, torch: samples of a call; any by default", min=1)] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="then upload it to the hub")] = None,
) -> None:
    """Take a pruned model elsewhere; it is opened in a fresh process and compared before this reports success."""
    from rich.table import Table

    from prunekit.export.card import push_to_hub
    from prunekit.serving.exporting import export

    done = export(source, directory, tier, method, expert, batch)
    table = Table("checked", "opened by", "relative error", "allowed")
    for line in done.checked:
        errors = (f"{line['relative_error']:.1e}", f"{line['tolerance']:.0e}")
        table.add_row(line["what"], line["opened_by"], *errors)
    _console().print(table)
    _say(f"{len(done.tiers)} UNet(s), tier {', '.join(dict.fromkeys(done.tiers))}, are in {done.directory}")
    if push is not None:
        _say(f"They are also at {push_to_hub(done.directory, push)}")


@app.command("import")
def import_(
    kind: Annotated[str, typer.Argument(metavar="aptp", help="whose format it has: aptp")],
    release: Annotated[Path, typer.Argument(metavar="DIR", help="a release's directory, such as APTP-Base-COCO")],
    output: Annotated[Path | None, typer.Option(help="the run that it becomes; runs/NAME by default")] = None,
    model: Annotated[str, typer.Option(help="what was pruned")] = "sd-2.1",
    prompt_encoder: Annotated[
        str, typer.Option(help="what the router embeds prompts with")
    ] = "sentence-transformers/all-mpnet-base-v2",
) -> None:
    """Turn the checkpoints that APTP's authors released into a run, which generate, export and macs understand."""
    from rich.table import Table

    from prunekit.importing import import_aptp

    if kind != "aptp":
        raise ValueError(f"import {kind}: choose aptp")
    done = import_aptp(release, output or Path("runs") / release.resolve().name, model, prompt_encoder)
    table, info = Table("expert", "MACs", "% of dense", "parameters", "weights"), done.result.info
    for index, source in enumerate(done.weights):
        numbers = (f"{info['macs'][index]:,}", f"{100 * info['ratio'][index]:.2f}", f"{info['params'][index]:,}")
        table.add_row(str(index), *numbers, source)
    _console().print(table)
    for note in done.notes:
        _say(note)
    router = "a router" if done.result.router is not None else "no router"
    _say(f"{len(done.weights)} architecture(s) and {router} are in {done.directory}")


@app.command()
def bench(
    target: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN", help="a recipe with job: bench, or a run's directory")
    ],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="where rows and table go; runs/NAME or RUN/bench by default")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="begin no row that would end later; start again", min=0)] = None,
    reduced: Annotated[bool, typer.Option("--reduced", help="32 x 32 latents, batch 1, eager, few repeats")] = False,
) -> None:
    """Time pruned models beside the dense one, interleaved, with the noise floor; a row a file, none made twice."""
    from rich.table import Table

    from prunekit.benchmark.command import bench
    from prunekit.benchmark.table import BRIEF, shown

    path, recipe, rows, is_done = bench(target, overrides or (), output, minutes, reduced, _say)
    header, lines = shown(rows, recipe, BRIEF)
    table = Table(*header)
    for line in lines:
        table.add_row(*(text.replace("[", r"\[") for text in line))
    _console().print(table)
    _say(f"The table is in {path}" + ("" if is_done else "; rows are missing: start the same command again to go on"))


def _latent_size(size: str | None) -> int | tuple[int, int] | None:
    if size is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size.strip().lower())
    if match is None or "0" in (match[1], match[2]):
        raise ValueError(f"--size {size}: give the latent's side, such as 64, or HxW, such as 64x96")
    height = int(match[1])
    return (height, int(match[2])) if match[2] else height


def _console() -> Any:
    """Return a console on stdout that keeps tables whole where there is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def _say(text: str) -> None:
    typer.echo(text)


def main() -> None:
    """Run the command line."""
    app()
