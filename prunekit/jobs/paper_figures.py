"""`prunekit figure`: the figures of the APTP paper, drawn for prunekit's runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.core.space import near
from prunekit.data.config import load_data, recorded_data
from prunekit.evaluation.generate import generate
from prunekit.evaluation.sheets import PictureRow, expert_note, picture_sheet, save_figure, shortened
from prunekit.methods.transport import assign
from prunekit.models import load_pipeline_of
from prunekit.report.comparison_table import BY_KEY, PROTOCOLS, rows_of
from prunekit.report.pareto import panels_of
from prunekit.report.source import Source
from prunekit.report.svg import color, style
from prunekit.report.training_curves import by_training
from prunekit.runtime.errors import UserError
from prunekit.runtime.randomness import generator
from prunekit.runtime.run_directory import DENSE, read_recipe
from prunekit.serving.pipeline import PromptRoutedPipeline
from prunekit.serving.prompts import extreme_prompts, shipped_prompts, validation_prompts

SMOOTH = 2  # logged steps on each side of a point that are averaged in a curve
LINES = ("-", "--", ":", "-.")
SQUARES = 16  # prompts per line in the picture of a batch's assignment


@dataclass(frozen=True)
class Drawing:
    """Settings with which the pictures of a sheet are drawn.

    Args:
        count: number of prompts, per row or per expert.
        steps: number of scheduler steps.
        guidance: guidance scale; None: the recipe's.
        seed: seed of every prompt's noise.
        prompts: name of a shipped list; None: captions that no training of the run uses.

    """

    count: int = 6
    steps: int = 25
    guidance: float | None = None
    seed: int = 0
    prompts: str | None = None


def experts_sheet(runs: Sequence[Path], drawing: Drawing, output: Path) -> Path:
    """Draw one row per expert, with prompts that the router sends to the expert (Figures 3, 11 and 12).

    Experts without prompts have no row. Raises UserError if one expert gets every prompt.
    """
    (run,) = _one(runs)
    pipeline = _routed(run)
    prompts = _prompts(run, drawing)
    experts = pipeline.route(prompts).tolist()
    macs, rows = _macs(pipeline), []
    used = sorted(set(experts), key=lambda expert: macs[expert])
    if len(used) < 2:
        raise UserError(f"{run}: one expert gets all {len(prompts)} prompts; there are no experts to compare")
    for expert in used:
        served = [prompt for prompt, other in zip(prompts, experts, strict=True) if other == expert][: drawing.count]
        pictures = _drawn(pipeline, served, drawing, run)
        blank = drawing.count - len(served)
        pictures = torch.cat([pictures, torch.full((blank, *pictures.shape[1:]), 255, dtype=torch.uint8)])
        notes = [shortened(prompt) for prompt in served] + [""] * blank
        rows.append(PictureRow(expert_note(expert, macs[expert]).replace(" · ", "\n"), pictures, notes))
    return picture_sheet(output, rows, [""] * drawing.count, f"{run.name}: prompts of each expert, by its MACs")


def extremes_sheet(runs: Sequence[Path], drawing: Drawing, output: Path) -> Path:
    """Draw prompts of the cheapest and of the most expensive expert, also with the dense model (Figure 4)."""
    (run,) = _one(runs)
    pipeline = _routed(run)
    prompts = extreme_prompts(pipeline, _prompts(run, drawing), drawing.count)
    experts, macs = pipeline.route(prompts).tolist(), _macs(pipeline)
    dense = load_pipeline_of(read_recipe(run)).to(pipeline.device)
    rows = [
        PictureRow(DENSE, _drawn(dense, prompts, drawing, run)),
        PictureRow("routed", _drawn(pipeline, prompts, drawing, run), [expert_note(e, macs[e]) for e in experts]),
    ]
    return picture_sheet(
        output, rows, prompts, f"{run.name}: prompts of the cheapest expert, then of the most expensive one"
    )


def runs_sheet(runs: Sequence[Path], drawing: Drawing, output: Path) -> Path:
    """Draw the same prompts and noise with several runs and with the first run's dense model (Figure 14)."""
    prompts = _prompts(runs[0], drawing)[: drawing.count]
    pipeline = load_pipeline_of(read_recipe(runs[0]))
    rows = [PictureRow(DENSE, _drawn(pipeline, prompts, drawing, runs[0]))]
    for run in runs:
        pipeline = _routed(run)
        experts, macs = pipeline.route(prompts).tolist(), _macs(pipeline)
        notes = [expert_note(expert, macs[expert]) for expert in experts]
        rows.append(PictureRow(run.resolve().name, _drawn(pipeline, prompts, drawing, run), notes))
    return picture_sheet(output, rows, prompts, "the same prompts and noise")


def assignment_picture(runs: Sequence[Path], drawing: Drawing, output: Path) -> Path:
    """Show the expert of each prompt in a training batch, by the nearest code and by optimal transport (Figure 7).

    Each prompt's scores are divided by the largest magnitude among them, which replaces the unknown factor between
    scores and cosines. All runs use the same batch. drawing.count: number of lines, of 16 prompts each. To compare a
    training with transport and one without, give both runs.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    columns = [
        (f"{run.resolve().name}\n{how}", assigned) for run in runs for how, assigned in _assigned(run, drawing).items()
    ]
    with style():
        figure = Figure(
            figsize=(2.6 * len(columns), 0.9 + 0.16 * drawing.count), facecolor="white", layout="constrained"
        )
        for position, (title, experts) in enumerate(columns, start=1):
            panel = figure.add_subplot(1, len(columns), position)
            colors = ListedColormap([color(expert) for expert in range(int(experts.max()) + 1)])
            panel.pcolormesh(
                experts.view(-1, min(SQUARES, len(experts))).flip(0).numpy(),
                cmap=colors,
                edgecolors="white",
                linewidth=1.5,
            )
            counts = torch.bincount(experts).tolist()
            panel.set(title=title, xlabel=f"prompts by expert: {', '.join(map(str, counts))}", xticks=[], yticks=[])
            panel.set_aspect("equal")
            for spine in panel.spines.values():
                spine.set_visible(False)
        return save_figure(figure, output)


def loss_curves(
    runs: Sequence[Path], output: Path, rows: Sequence[str] = (), terms: Sequence[str] = ("resource", "contrastive")
) -> Path:
    """Draw loss terms over the steps of the searches of a run or comparison, one panel per term (Figure 6).

    rows: beginnings of the titles of the searches to draw; all searches by default. terms: names of the loss terms.
    Raises UserError if the log has no such search.
    """
    from matplotlib.figure import Figure

    (run,) = _one(runs)
    trainings = by_training(Source(run).log)
    searches = {title: steps for title, steps in trainings.items() if all(term in steps[0] for term in terms)}
    chosen = {title: steps for title, steps in searches.items() if not rows or title.startswith(tuple(rows))}
    if not chosen:
        known = ", ".join(searches) or "none"
        raise UserError(f"{run} has no search with the terms {', '.join(terms)} of these rows; its searches: {known}")
    with style():
        figure = Figure(figsize=(4.2 * len(terms), 3.4), facecolor="white", layout="constrained")
        for position, term in enumerate(terms, start=1):
            panel = figure.add_subplot(1, len(terms), position)
            for index, (title, steps) in enumerate(chosen.items()):
                values = _smoothed([row[term] for row in steps])
                panel.plot([row["step"] for row in steps], values, LINES[index % 4], color=color(index), label=title)
            panel.set(xlabel="step of the search", ylabel=f"{term} loss, with its weight", title=f"{term} loss")
            panel.legend()
        return save_figure(figure, output)


def _smoothed(values: Sequence[float]) -> list[float]:
    windows = [values[max(0, at - SMOOTH) : at + SMOOTH + 1] for at in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def num_experts_picture(runs: Sequence[Path], drawing: Drawing, output: Path) -> Path:
    """Draw a comparison's figures against the number of experts, with 95 % intervals over the seeds (Figure 5).

    Rows with a single architecture have 1 expert. If the comparison has several protocols, the rows of the first are
    drawn: equal_steps if the recipe has it.
    """
    from matplotlib.figure import Figure

    (run,) = _one(runs)
    source = Source(run)
    if not source.is_comparison or not source.cells:
        raise UserError(f"{run} holds no finished cells of a comparison; this figure is of one")
    pruned = [row for row in rows_of(source.cells) if row.method != DENSE]
    if not pruned:
        raise UserError(f"{run} holds no finished cells of pruned models")
    first = min((row.protocol for row in pruned), key=list(PROTOCOLS).index)
    rows = [row for row in pruned if row.protocol == first]
    names = panels_of(rows)
    with style():
        figure = Figure(figsize=(4.2 * len(names), 3.4), facecolor="white", layout="constrained")
        for position, name in enumerate(names, start=1):
            panel, column = figure.add_subplot(1, len(names), position), BY_KEY[name]
            for index, budget in enumerate(dict.fromkeys(row.budget for row in rows)):
                mixtures = sorted((row for row in rows if row.budget == budget), key=lambda row: row.models)
                means = [row.estimates[name].mean * column.scale for row in mixtures]
                halves = [(row.estimates[name].high - row.estimates[name].low) / 2 * column.scale for row in mixtures]
                counts = [row.models for row in mixtures]
                line = "-" if len(set(counts)) == len(counts) else ""  # several rows with one count are no curve
                panel.errorbar(
                    counts, means, halves, marker="o", linestyle=line, capsize=3, color=color(index), label=budget
                )
            panel.set(xlabel="experts", ylabel=column.header, xticks=sorted({row.models for row in rows}))
            panel.legend(title="budget")
        return save_figure(figure, output)


SHEETS: dict[str, Callable[[Sequence[Path], Drawing, Path], Path]] = {
    "experts": experts_sheet,
    "extremes": extremes_sheet,
    "runs": runs_sheet,
    "assignment": assignment_picture,
    "num-experts": num_experts_picture,
}
LOSSES = "losses"


def draw_figure(
    kind: str, runs: Sequence[Path], drawing: Drawing, output: Path, rows: Sequence[str], terms: Sequence[str]
) -> Path:
    """Draw a figure by its kind: a key of SHEETS, or "losses". Raises UserError for another kind."""
    if kind == LOSSES:
        return loss_curves(runs, output, rows, *([terms] if terms else []))
    if kind not in SHEETS:
        raise UserError(f"no figure {kind!r}.{near(kind, [*SHEETS, LOSSES])}")
    return SHEETS[kind](runs, drawing, output)


def _one(runs: Sequence[Path]) -> Sequence[Path]:
    if len(runs) != 1:
        raise UserError(f"this figure is of one run; got {len(runs)}")
    return runs


def _routed(run: Path) -> PromptRoutedPipeline:
    pipeline = PromptRoutedPipeline.from_pretrained(run)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _macs(pipeline: PromptRoutedPipeline) -> list[int]:
    macs = (pipeline.mixture.info.get("result") or {}).get("macs")
    if not macs:
        raise UserError("the MACs of these experts were not recorded; give the directory of a run")
    return list(macs)


def _prompts(run: Path, drawing: Drawing) -> list[str]:
    return shipped_prompts(drawing.prompts) if drawing.prompts else validation_prompts(read_recipe(run))


def _drawn(pipeline: Any, prompts: Sequence[str], drawing: Drawing, run: Path) -> Tensor:
    """Return the prompts' pictures, uint8 (n, 3, H, W)."""
    guidance = drawing.guidance
    if guidance is None:
        guidance = float((read_recipe(run).get("evaluation") or {}).get("guidance", 3.0))
    return generate(pipeline, prompts, [drawing.seed] * len(prompts), drawing.steps, guidance, batch_size=4)


def _assigned(run: Path, drawing: Drawing) -> dict[str, Tensor]:
    """Return the experts (n,) of a batch of training prompts under "nearest" (the router) and under "transport"."""
    recipe, pipeline = read_recipe(run), _routed(run)
    images = load_data(recorded_data(recipe["data"]), recipe["seed"])
    pairs = images.training_pairs()
    order = torch.randperm(len(pairs), generator=generator(drawing.seed, "assignment"))[: SQUARES * drawing.count]
    order = order[: len(order) // SQUARES * SQUARES or len(order)]
    router, encoder = pipeline.mixture.router, pipeline.mixture.encoder
    if router is None or encoder is None:
        raise UserError(f"{run} has no router: there is nothing to assign")
    embeddings = torch.as_tensor(encoder.encode([images.captions[pair] for pair in pairs[order].tolist()]))
    scores = router.scores(embeddings)  # cosines times a length that the router does not keep
    cosines = scores / scores.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    return {"nearest": router.route(embeddings), "transport": assign(cosines)}
