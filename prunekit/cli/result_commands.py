"""The commands about what a run made: generate, evaluate, report, demo, serve, export, import, bench."""

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.application import Engine, Overrides, app, console, say
from prunekit.jobs.shipped import find_recipe
from prunekit.runtime.errors import UserError
from prunekit.serving.limits import Limits, ServerSettings, check_packages

MOST_ROWS = 50  # of pictures that `generate` lists


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
    method: Annotated[str | None, typer.Option(help="whose pruned model; the one that routes by default")] = None,
    seed: Annotated[int, typer.Option(help="of every prompt's noise", min=0)] = 0,
    negative_prompt: Annotated[str | None, typer.Option(help="what guidance leads away from")] = None,
    steps: Annotated[int, typer.Option(help="scheduler steps", min=1)] = 25,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; the recipe's by default", min=0)] = None,
    batch_size: Annotated[int, typer.Option(help="pictures of one pipeline call", min=1)] = 1,
    max_resident: Annotated[int | None, typer.Option(help="experts in memory at once; all by default", min=1)] = None,
    picture_format: Annotated[str, typer.Option("--format", help="png or webp, both without loss")] = "png",
    output: Annotated[
        Path | None, typer.Option(help="where pictures go; by default RUN/generated/METHOD, or METHOD-2, … by request")
    ] = None,
    engine: Engine = None,
) -> None:
    """Draw prompts, each by the expert that serves it; several processes may share the work, and it can be resumed."""
    from rich.table import Table

    from prunekit.runtime.engines import executor_of, load_engine
    from prunekit.runtime.progress import Saying
    from prunekit.serving.bulk import Request, Source, free_directory, generate_to, weights_digest
    from prunekit.serving.prompts import collect

    given: dict[str, Any] = {"prompts": prompt or (), "file": prompts_file, "shipped": prompt_list}
    drawn_on, source = load_engine(engine or ()), Source(str(directory), method, max_resident)
    pipeline = source.open()
    prompts = collect(pipeline, directory, **given, validation=validation, extremes=extremes)
    drawn_by = (steps, guidance, negative_prompt, None, batch_size, picture_format)
    method = pipeline.mixture.info.get("method") or method or "pipeline"
    request = Request(prompts, [seed] * len(prompts), *drawn_by)
    weights = weights_digest(pipeline)
    folder = output or free_directory(directory / "generated" / method, pipeline, request, weights)
    with executor_of(drawn_on, Saying(say)) as executor:
        pictures = generate_to(folder, pipeline, request, weights, executor, source)
    table = Table("picture", "expert", "prompt")
    for text, (path, expert) in list(zip(prompts, pictures, strict=True))[:MOST_ROWS]:
        table.add_row(path.name, str(expert), text[:100])
    console().print(table)
    of = f"by {method} ({pipeline.num_experts} experts), seed {seed}"
    say(f"{len(prompts)} pictures {of}, are in {folder}")


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
    from prunekit.evaluation.evaluate import TABLE, evaluate
    from prunekit.evaluation.table import terminal_table
    from prunekit.runtime.termination import graceful

    places, overrides = [t for t in targets if "=" not in t], [t for t in targets if "=" in t]
    with graceful():
        done = evaluate(places, protocol, data, images, overrides, output, say)
    terminal = console()
    terminal.print(terminal_table(*done.shown(), f"protocol {protocol}", terminal.width))
    say(f"The table is in {done.folder / TABLE}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="directories of runs and comparisons")],
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="first measure each layer's damage, and what an older run lacks")
    ] = False,
) -> None:
    """Write one HTML page a run or comparison: figures, pictures, architectures, routing, training, trust."""
    from prunekit.jobs.reporting import report

    for path in report(runs, sensitivity, say):
        say(f"The report is {path}")


@app.command()
def figure(
    kind: Annotated[str, typer.Argument(help="experts, extremes, runs, assignment, losses or num-experts")],
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="directories of runs; for losses a comparison too")
    ],
    output: Annotated[Path, typer.Option(help="the picture, a PNG")] = Path("figure.png"),
    count: Annotated[int, typer.Option(help="prompts: of each expert, of each extreme, or of all runs", min=1)] = 6,
    prompt_list: Annotated[
        str | None, typer.Option("--list", help="a shipped list of prompts; the run's held-out captions by default")
    ] = None,
    steps: Annotated[int, typer.Option(help="scheduler steps", min=1)] = 25,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; the recipe's by default", min=0)] = None,
    seed: Annotated[int, typer.Option(help="of every prompt's noise, and of the batch that is assigned", min=0)] = 0,
    row: Annotated[
        list[str] | None, typer.Option(help="losses: what titles of searches begin with (repeatable)")
    ] = None,
    term: Annotated[
        list[str] | None, typer.Option(help="losses: a term (repeatable); resource and contrastive")
    ] = None,
) -> None:
    """Draw a figure of the APTP paper for runs: pictures by expert, by budget, by run; a batch's assignment; losses."""
    from prunekit.jobs.paper_figures import Drawing, draw_figure

    drawing = Drawing(count, steps, guidance, seed, prompt_list)
    say(f"The figure is {draw_figure(kind, runs, drawing, output, row or (), term or ())}")


@app.command()
def demo(
    directory: Annotated[
        Path, typer.Argument(metavar="RUN", help="a run's directory, an export, or any diffusers pipeline")
    ],
    method: Annotated[
        str | None, typer.Option(help="of a run: whose pruned model; the one that routes by default")
    ] = None,
    host: Annotated[str, typer.Option(help="the address to listen on; 0.0.0.0: all of this machine's")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="the first free one from 7860 on by default", min=1, max=65535)
    ] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda:1; a GPU by default")] = None,
) -> None:
    """Serve a page to try prompts in: the dense model beside the chosen expert, with scores, time and MACs."""
    from prunekit.demo.web_page import serve

    serve(directory, method, host, port, device, say)


@app.command()
def serve(
    directory: Annotated[
        Path, typer.Argument(metavar="RUN|EXPORT", help="a run's directory, an export, or any diffusers pipeline")
    ],
    method: Annotated[
        str | None, typer.Option(help="of a run: whose pruned model; the one that routes by default")
    ] = None,
    host: Annotated[str, typer.Option(help="the address to listen on; 0.0.0.0: all of this machine's")] = (
        ServerSettings.host
    ),
    port: Annotated[int, typer.Option(help="0: any free one", min=0, max=65535)] = ServerSettings.port,
    device: Annotated[
        list[str] | None, typer.Option(help="such as cpu or cuda:1; a GPU by default (repeatable: a copy on each)")
    ] = None,
    name: Annotated[str | None, typer.Option(help="the model's name in the API; the directory's by default")] = None,
    max_batch: Annotated[int, typer.Option(help="images of one pipeline call", min=1)] = ServerSettings.max_batch,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="draw each image alone: its bytes depend on its request alone")
    ] = False,
    max_resident: Annotated[
        int | None, typer.Option(help="experts in a device's memory at once; all by default", min=1)
    ] = None,
    max_queued: Annotated[int, typer.Option(help="images that may wait; more get status 503", min=1)] = (
        ServerSettings.max_queued
    ),
    max_steps: Annotated[int, typer.Option(help="scheduler steps of a request at most", min=1)] = Limits.steps,
    max_images: Annotated[int, typer.Option(help="images of a request (n) at most", min=1)] = Limits.images,
    max_letters: Annotated[int, typer.Option(help="letters of a prompt at most", min=1)] = Limits.letters,
    max_pixels: Annotated[
        int | None, typer.Option(help="pixels of an image at most; those of the model's own size by default", min=1)
    ] = None,
    request_timeout: Annotated[float, typer.Option(help="seconds; after them a request gets status 504", min=0.1)] = (
        ServerSettings.request_seconds
    ),
    api_key: Annotated[
        str | None, typer.Option(envvar="PRUNEKIT_API_KEY", help="that requests must carry; none by default")
    ] = None,
) -> None:
    """Serve OpenAI's image API over HTTP: prompts are batched by expert; SIGTERM answers what was accepted first."""
    check_packages()
    settings = ServerSettings(
        method=method,
        host=host,
        port=port,
        devices=tuple(device or ()),
        name=name,
        max_batch=max_batch,
        max_resident=max_resident,
        max_queued=max_queued,
        deterministic=deterministic,
        request_seconds=request_timeout,
        api_key=api_key,
        limits=Limits(max_letters, max_steps, max_images, pixels=max_pixels),
    )
    from prunekit.serving.server import serve

    serve(directory, settings, say)


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL", help="a run, a pipeline's directory, or a denoiser's folder")
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="where it goes; new or empty")],
    tier: Annotated[
        str,
        typer.Option(help="stock, class, single-file, onnx, torch; auto: stock where it expresses the cut, else class"),
    ] = "auto",
    method: Annotated[
        str | None, typer.Option(help="of a run: whose pruned model; the one that routes by default")
    ] = None,
    expert: Annotated[int | None, typer.Option(help="of a mixture: this expert alone", min=0)] = None,
    batch: Annotated[int | None, typer.Option(help="onnx, torch: samples of a call; any by default", min=1)] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="then upload it to the hub")] = None,
    fold_modulation: Annotated[
        str | None,
        typer.Option(
            metavar="table=N|rank=R",
            help="of a transformer: modulation layers as a table of the sampler's N steps, or of rank R; nearest=N: a "
            "table that rounds timesteps; @WIDTHxHEIGHT behind it: the pictures' size",
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="rank=R: prompts, one a line, that it is fitted to; a shipped list by default")
    ] = None,
) -> None:
    """Take a pruned model elsewhere; it is opened in a fresh process and compared before this reports success."""
    from rich.table import Table

    from prunekit.export.card import push_to_hub
    from prunekit.serving.exporting import export

    done = export(source, directory, tier, method, expert, batch, fold_modulation, prompts_file)
    table = Table("checked", "opened by", "relative error", "allowed")
    for line in done.checked:
        errors = (f"{line['relative_error']:.1e}", f"{line['tolerance']:.0e}")
        table.add_row(line["what"], line["opened_by"], *errors)
    console().print(table)
    say(f"{len(done.tiers)} denoiser(s), tier {', '.join(dict.fromkeys(done.tiers))}, are in {done.directory}")
    if push is not None:
        say(f"They are also at {push_to_hub(done.directory, push)}")


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

    from prunekit.jobs.import_aptp import import_aptp

    if kind != "aptp":
        raise UserError(f"import {kind}: choose aptp")
    done = import_aptp(release, output or Path("runs") / release.resolve().name, model, prompt_encoder)
    table, info = Table("expert", "MACs", "% of dense", "parameters", "weights"), done.result.info
    for index, source in enumerate(done.weights):
        numbers = (f"{info.macs[index]:,}", f"{100 * info.ratio[index]:.2f}", f"{info.params[index]:,}")
        table.add_row(str(index), *numbers, source)
    console().print(table)
    for note in done.notes:
        say(note)
    router = "a router" if done.result.router is not None else "no router"
    say(f"{len(done.weights)} architecture(s) and {router} are in {done.directory}")


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

    target = target if target.is_dir() else find_recipe(target)
    from prunekit.jobs.bench.bench_job import bench
    from prunekit.jobs.bench.bench_table import BRIEF, shown

    path, recipe, rows, is_done = bench(target, overrides or (), output, minutes, reduced, say)
    header, lines = shown(rows, recipe, BRIEF)
    table = Table(*header)
    for line in lines:
        table.add_row(*(text.replace("[", r"\[") for text in line))
    console().print(table)
    say(f"The table is in {path}" + ("" if is_done else "; rows are missing: start the same command again to go on"))
