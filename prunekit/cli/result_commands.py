"""The commands about results of runs: generate, evaluate, report, figure, demo, serve, export, import, bench."""

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.application import Engine, Overrides, app, console, print_table, say
from prunekit.jobs.shipped import find_recipe
from prunekit.runtime.errors import UserError
from prunekit.serving.limits import API_KEY, Limits, PoolSettings, ServerSettings, check_packages

MOST_ROWS = 50  # largest number of pictures that `generate` lists


@app.command()
def generate(
    directory: Annotated[
        Path, typer.Argument(metavar="RUN", help="Directory of a run or an export, or any diffusers pipeline.")
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Prompt to draw (repeatable).")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt per line.")] = None,
    prompt_list: Annotated[
        str | None, typer.Option("--list", help="Shipped list of prompts: aptp-cc3m, aptp-coco, aptp-parti.")
    ] = None,
    validation: Annotated[
        int | None, typer.Option(help="Draw the first N held-out captions of the run.", min=1)
    ] = None,
    extremes: Annotated[
        int | None,
        typer.Option(help="Draw N held-out captions each of the cheapest and of the most expensive expert.", min=1),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Method whose pruned model is used; by default the method with a router, else the first."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every prompt's noise.", min=0)] = 0,
    negative_prompt: Annotated[str | None, typer.Option(help="Text that guidance moves the picture away from.")] = None,
    steps: Annotated[int, typer.Option(help="Number of scheduler steps.", min=1)] = 25,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the recipe's by default.", min=0)] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures per pipeline call.", min=1)] = 1,
    max_resident: Annotated[
        int | None, typer.Option(help="Number of experts in memory at the same time; all by default.", min=1)
    ] = None,
    picture_format: Annotated[
        str, typer.Option("--format", help="Picture format: png or webp, both lossless.")
    ] = "png",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory for pictures; by default RUN/generated/METHOD, then METHOD-2 for another request, and "
            "so on."
        ),
    ] = None,
    engine: Engine = None,
) -> None:
    """Draw prompts with a run's pruned model; several processes may share the work; a stopped one can be resumed."""
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
    drawn = [[path.name, str(expert), text] for text, (path, expert) in zip(prompts, pictures, strict=True)]
    print_table(["picture", "expert", "prompt"], drawn[:MOST_ROWS], ["expert"])
    if len(drawn) > MOST_ROWS:
        say(f"{len(drawn) - MOST_ROWS} more pictures are not listed")
    of = f"by {method} ({pipeline.num_experts} experts), seed {seed}"
    say(f"{len(prompts)} pictures {of}, are in {folder}")


@app.command()
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET... [KEY=VALUE]...",
            help="Runs, diffusers directories, hub ids or emoji; and settings of the protocol as KEY=VALUE.",
        ),
    ],
    protocol: Annotated[
        str, typer.Option(help="Protocol by which pictures are made and measured: emoji, aptp or bksdm.")
    ] = "emoji",
    data: Annotated[
        str | None,
        typer.Option(
            help='emoji, a folder, a recipe, or "{kind: coco, path: coco, split: val30k}"; by default the run\'s data.'
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Pictures per model; the protocol's number by default.", min=2)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for pictures and table; runs/evaluate-PROTOCOL by default.")
    ] = None,
) -> None:
    """Measure runs and diffusers pipelines by one protocol; processes may share the work; a stopped one resumes."""
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
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs and comparisons.")],
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="First measure the sensitivity of each layer, and figures that an older run did not record.",
        ),
    ] = False,
) -> None:
    """Write an HTML page for each run or comparison: figures, pictures, architectures, routing, training, checks."""
    from prunekit.jobs.reporting import report

    for path in report(runs, sensitivity, say):
        say(f"The report is {path}")


@app.command()
def figure(
    kind: Annotated[str, typer.Argument(help="Figure: experts, extremes, runs, assignment, losses or num-experts.")],
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories of runs; for losses also of a comparison.")
    ],
    output: Annotated[Path, typer.Option(help="File to write the picture to, a PNG.")] = Path("figure.png"),
    count: Annotated[int, typer.Option(help="Number of prompts: per expert, per extreme, or for all runs.", min=1)] = 6,
    prompt_list: Annotated[
        str | None, typer.Option("--list", help="Shipped list of prompts; the run's held-out captions by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of scheduler steps.", min=1)] = 25,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the recipe's by default.", min=0)] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of every prompt's noise, and of the batch that is assigned.", min=0)
    ] = 0,
    row: Annotated[
        list[str] | None, typer.Option(help="losses: searches whose titles begin with this text (repeatable).")
    ] = None,
    term: Annotated[
        list[str] | None,
        typer.Option(help="losses: term to draw (repeatable); resource and contrastive by default."),
    ] = None,
) -> None:
    """Draw a figure of the APTP paper for your runs, such as pictures by expert, assignments or losses."""
    from prunekit.jobs.paper_figures import Drawing, draw_figure

    drawing = Drawing(count, steps, guidance, seed, prompt_list)
    say(f"The figure is {draw_figure(kind, runs, drawing, output, row or (), term or ())}")


@app.command()
def demo(
    directory: Annotated[
        Path, typer.Argument(metavar="RUN", help="Directory of a run or an export, or any diffusers pipeline.")
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="Method of a run whose pruned model is used; by default the method with a router, else the first."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: all addresses of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port; by default the first free port from 7860 on.", min=1, max=65535)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device, such as cpu or cuda:1; by default a GPU if there is one.")
    ] = None,
) -> None:
    """Serve a page to try prompts in: the dense model beside the chosen expert, with scores, time and MACs."""
    from prunekit.demo.web_page import serve

    serve(directory, method, host, port, device, say)


@app.command()
def serve(
    directory: Annotated[
        Path,
        typer.Argument(metavar="RUN|EXPORT", help="Directory of a run or an export, or any diffusers pipeline."),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="Method of a run whose pruned model is used; by default the method with a router, else the first."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all addresses of this machine.")] = (
        ServerSettings.host
    ),
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0: any free port.", min=0, max=65535)
    ] = ServerSettings.port,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Device, such as cpu or cuda:1 (repeatable: one copy per device); by default a GPU if any."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in the API; the directory's name by default.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Images per pipeline call, at most.", min=1)] = (
        ServerSettings.max_batch
    ),
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Draw each image alone, so that its bytes depend only on its request."),
    ] = False,
    max_resident: Annotated[
        int | None, typer.Option(help="Experts in a device's memory at the same time; all by default.", min=1)
    ] = None,
    max_queued: Annotated[
        int, typer.Option(help="Images that may wait; further requests get status 503.", min=1)
    ] = ServerSettings.max_queued,
    max_steps: Annotated[int, typer.Option(help="Scheduler steps of a request, at most.", min=1)] = Limits.steps,
    max_images: Annotated[int, typer.Option(help="Images (n) of a request, at most.", min=1)] = Limits.images,
    max_letters: Annotated[int, typer.Option(help="Characters of a prompt, at most.", min=1)] = Limits.letters,
    max_pixels: Annotated[
        int | None, typer.Option(help="Pixels of an image, at most; by default those of the model's own size.", min=1)
    ] = None,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds after which a request gets status 504.", min=0.1)
    ] = ServerSettings.request_seconds,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=API_KEY, help="API key that requests must carry; none by default."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="Engine: local: this process draws; ray: replicas on a Ray cluster.", metavar="local|ray"),
    ] = "local",
    replicas: Annotated[
        str,
        typer.Option(
            help="Number of replicas of the model, for engine ray; MIN:MAX scales with the load.", metavar="N|MIN:MAX"
        ),
    ] = "1",
    gpus_per_replica: Annotated[
        float | None,
        typer.Option(help="GPUs per replica, for engine ray; by default 1 if the cluster has GPUs, else 0.", min=0),
    ] = None,
    cpus_per_replica: Annotated[
        float, typer.Option(help="CPU cores and threads per replica, for engine ray.", min=0)
    ] = PoolSettings.cpus,
    ray_address: Annotated[
        str,
        typer.Option(help="Address of the Ray cluster; auto: the one of this machine; local: start one for this run."),
    ] = PoolSettings.address,
    write_config: Annotated[
        Path | None,
        typer.Option(help="Only write the YAML file for `serve deploy` and KubeRay to this file.", metavar="FILE"),
    ] = None,
) -> None:
    """Serve OpenAI's image API over HTTP, in batches per expert; after SIGTERM, finish the accepted requests."""
    check_packages()
    pool = PoolSettings.of(replicas, cpus_per_replica, gpus_per_replica, ray_address)
    if engine not in ("local", "ray"):
        raise UserError(f"--engine {engine}: give local or ray")
    on_ray = engine == "ray" or write_config is not None
    if on_ray and device:
        raise UserError("--device is for --engine local: Ray gives replicas their GPUs, see --gpus-per-replica")
    if not on_ray and pool != PoolSettings():
        raise UserError("replicas, their CPUs and GPUs, and the cluster's address are of --engine ray: give it too")
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
    if write_config is not None:
        from prunekit.serving.ray_config import write

        write(directory, settings, pool, write_config)
        say(f"{write_config} is written; deploy it with: serve deploy {write_config}")
    elif engine == "ray":
        check_packages("ray")
        from prunekit.serving.ray_server import serve_on_ray

        serve_on_ray(directory, settings, pool, say)
    else:
        from prunekit.serving.server import serve

        serve(directory, settings, say)


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL", help="Directory of a run, of a pipeline, or of a denoiser.")
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Directory of the export; it must be new or empty.")
    ],
    tier: Annotated[
        str,
        typer.Option(
            help="Tier: stock, class, single-file, onnx or torch; auto: stock if a stock config expresses the cut, "
            "else class."
        ),
    ] = "auto",
    method: Annotated[
        str | None,
        typer.Option(
            help="Method of a run whose pruned model is used; by default the method with a router, else the first."
        ),
    ] = None,
    expert: Annotated[
        int | None, typer.Option(help="Number of one expert of a mixture, to export it alone.", min=0)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="onnx, torch: number of samples per call; any by default.", min=1)
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Repository of the hub to upload the export to.")
    ] = None,
    fold_modulation: Annotated[
        str | None,
        typer.Option(
            metavar="table=N|rank=R",
            help="Transformers: modulation layers as a table of the sampler's N steps, or of rank R; nearest=N: a "
            "table that rounds timesteps; a suffix @WIDTHxHEIGHT gives the size of the pictures.",
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="rank=R: file of prompts for the fit, one per line; a shipped list by default.")
    ] = None,
) -> None:
    """Write a pruned model for other programs; check it by opening it in a new process and comparing outputs."""
    from prunekit.export.card import push_to_hub
    from prunekit.serving.exporting import export

    done = export(source, directory, tier, method, expert, batch, fold_modulation, prompts_file)
    numeric = ("relative error", "allowed")
    lines = [
        [line["what"], line["opened_by"], f"{line['relative_error']:.1e}", f"{line['tolerance']:.0e}"]
        for line in done.checked
    ]
    print_table(["checked", "opened by", *numeric], lines, numeric)
    say(f"{len(done.tiers)} denoiser(s), tier {', '.join(dict.fromkeys(done.tiers))}, are in {done.directory}")
    if push is not None:
        say(f"They are also at {push_to_hub(done.directory, push)}")


@app.command("import")
def import_(
    kind: Annotated[str, typer.Argument(metavar="aptp", help="Format of the release: aptp.")],
    release: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a release, such as APTP-Base-COCO.")],
    output: Annotated[Path | None, typer.Option(help="Directory of the new run; runs/NAME by default.")] = None,
    model: Annotated[str, typer.Option(help="Dense model that the release was pruned from.")] = "sd-2.1",
    prompt_encoder: Annotated[
        str, typer.Option(help="Sentence Transformer of the router.")
    ] = "sentence-transformers/all-mpnet-base-v2",
) -> None:
    """Turn the checkpoints that APTP's authors released into a run, for generate, export and macs."""
    from prunekit.jobs.import_aptp import import_aptp

    if kind != "aptp":
        raise UserError(f"import {kind}: choose aptp")
    done = import_aptp(release, output or Path("runs") / release.resolve().name, model, prompt_encoder)
    numeric, info = ("expert", "MACs", "% of dense", "parameters"), done.result.info
    lines = [
        [str(index), f"{info.macs[index]:,}", f"{100 * info.ratio[index]:.2f}", f"{info.params[index]:,}", source]
        for index, source in enumerate(done.weights)
    ]
    print_table([*numeric, "weights"], lines, numeric)
    for note in done.notes:
        say(note)
    router = "a router" if done.result.router is not None else "no router"
    say(f"{len(done.weights)} architecture(s) and {router} are in {done.directory}")


@app.command()
def bench(
    target: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN", help="Recipe with job: bench, or the directory of a run.")
    ],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for rows and table; runs/NAME or RUN/bench by default.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Time limit in minutes: no row starts that would end later. Start the command again for missing rows.",
            min=0,
        ),
    ] = None,
    reduced: Annotated[
        bool, typer.Option("--reduced", help="Reduced size: latents of 32 x 32, batch 1, eager mode, few repeats.")
    ] = False,
) -> None:
    """Time pruned models against the dense one in interleaved calls, with the noise floor; finished rows are kept."""
    target = target if target.is_dir() else find_recipe(target)
    from prunekit.jobs.bench.bench_job import bench
    from prunekit.jobs.bench.bench_table import BRIEF, WORDS, shown

    path, recipe, rows, is_done = bench(target, overrides or (), output, minutes, reduced, say)
    header, lines = shown(rows, recipe, BRIEF)
    print_table(header, lines, [name for name in header if name not in WORDS])
    say(
        f"The table with all columns is in {path}"
        + ("" if is_done else "; rows are missing: start the same command again to continue")
    )
