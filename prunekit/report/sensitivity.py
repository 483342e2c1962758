"""Sensitivity: what the prediction loses when one layer's removable parts go, at each of a few time steps."""

from pathlib import Path
from typing import Any

import torch

from prunekit.core.discovery import discover
from prunekit.core.gates import gated
from prunekit.core.registry import denoiser_in, denoiser_of, process_of
from prunekit.core.space import Architecture
from prunekit.evaluation.agreement import AgreementSamples, data_samples, predictions
from prunekit.randomness import generator
from prunekit.report.architectures import layers_of
from prunekit.report.figures import inline_svg, new_figure, style
from prunekit.report.source import MissingError, Section, Source
from prunekit.stages import Stages
from prunekit.training.checkpoint import read_json, write_json
from prunekit.training.progress import Progress

FILE = "sensitivity.json"
SAMPLES = 8
TIMES = 8
NOTE = (
    "The dense UNet without one layer's removable parts (its inner width, and the whole layer where that can go), on "
    "the same {samples} noised pictures: mean squared change of the prediction, over the prediction's mean square. "
    "Bright: the layer matters at that time step. Small t is little noise."
)


@torch.no_grad()
def measure(stages: Stages, path: Path, samples: int = SAMPLES, times: int = TIMES) -> Path:
    """Measure every layer's damage at `times` time steps on `samples` fixed pictures, and write it as JSON."""
    model, process = denoiser_in(stages.pipeline), process_of(stages.pipeline)
    space = discover(model, stages.recipe.prune.depth)
    last, full = process.num_timesteps - 1, space.full().values
    timesteps = [round(last * (number + 0.5) / times) for number in range(times)]
    noised = _at(timesteps, data_samples(stages.data, stages.pipeline, stages.recipe.seed, samples), stages)
    layers, damage = layers_of(space, denoiser_of(model).outline(model)), {}
    with gated(model, space) as gates, Progress("sensitivity", len(layers)) as progress:
        gates.set(Architecture(space, full))
        dense = predictions(model, noised).double().unflatten(0, (times, samples))  # (T, n, C, h, w)
        size = dense.square().flatten(1).mean(1)  # (T,)
        for index, (layer, mask) in enumerate(layers.items()):
            gates.set(Architecture(space, full & ~mask))
            change = predictions(model, noised).double().unflatten(0, (times, samples)) - dense
            damage[layer] = (change.square().flatten(1).mean(1) / size).tolist()
            progress.update(index + 1)
    write_json(path, {"timesteps": timesteps, "damage": damage, "samples": samples})
    return path


def _at(timesteps: list[int], fixed: AgreementSamples, stages: Stages) -> AgreementSamples:
    """Return the fixed samples under one noise each at every time step, one step after another."""
    count = len(timesteps)
    latents = torch.as_tensor(stages.data.latents[stages.data.image_index[fixed.indices]]).cpu().float()
    noise = torch.randn(latents.shape, generator=generator(stages.recipe.seed, "sensitivity"))
    t = torch.tensor(timesteps).repeat_interleave(len(latents))
    noisy = process_of(stages.pipeline).noised(latents.repeat(count, 1, 1, 1), noise.repeat(count, 1, 1, 1), t)
    call = denoiser_of(denoiser_in(stages.pipeline)).at(fixed.call.repeat(count), noisy, t)
    return AgreementSamples(fixed.indices.repeat(count), call)


def sensitivity(source: Source) -> Section:
    """Return the section. Raises MissingError where it was not measured."""
    path = source.directory / FILE
    if not path.is_file():
        raise MissingError("not measured; `prunekit report RUN --sensitivity` does, and keeps it in the run")
    content = read_json(path)
    note = NOTE.format(samples=content["samples"])
    return Section("sensitivity", "Sensitivity", {"figure": _picture(content), "note": note})


def _picture(content: dict[str, Any]) -> str:
    import numpy as np
    from matplotlib.colors import LogNorm

    layers, damage = list(content["damage"]), np.array(list(content["damage"].values()))
    positive = damage[damage > 0]
    floor = max(float(positive.min()), float(positive.max()) * 1e-5) if len(positive) else 1e-9
    with style():
        figure, panel = new_figure(7.6, 0.9 + 0.22 * len(layers), left=2.1)
        place = panel.get_position()
        panel.set_position((place.x0, place.y0, place.width - 0.17, place.height))
        panel.grid(visible=False)
        norm = LogNorm(floor, max(float(damage.max()), floor * 10))
        mesh = panel.pcolormesh(np.maximum(damage, floor), norm=norm, cmap="viridis", edgecolors="face", linewidth=0.2)
        panel.invert_yaxis()
        panel.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=8)
        panel.set_xticks(np.arange(damage.shape[1]) + 0.5, [str(t) for t in content["timesteps"]])
        panel.set_xlabel("time step t (0: clean, high: noise)")
        panel.set_ylabel("layer, in the order of a forward pass")
        panel.set_title("What the prediction loses without a layer")
        beside = figure.add_axes((place.x1 - 0.145, place.y0, 0.025, place.height))
        bar = figure.colorbar(mesh, cax=beside)
        bar.set_label("change / mean square of the prediction (darkest: that or less)")
        return inline_svg(figure, "damage of every layer at every time step")
