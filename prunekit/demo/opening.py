"""Open a run, a routed export or a pipeline for the demo, with the dense model that it was cut from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunekit.core.axes import Place
from prunekit.core.cost import CostModel
from prunekit.core.discovery import discover
from prunekit.core.record import read_pruning
from prunekit.core.registry import denoiser_in, denoiser_of, latent_size
from prunekit.core.slicing import blank_copy
from prunekit.core.space import Architecture
from prunekit.data.config import DataConfig, load_data
from prunekit.evaluation.generate import REQUEST
from prunekit.export.tiers import architecture_of
from prunekit.methods.result import PruneResult
from prunekit.models import load_pipeline_of
from prunekit.models.names import EMBEDDED, EMBEDDED_DIRECTORIES
from prunekit.report.architectures import retained
from prunekit.runtime.files import read_json
from prunekit.runtime.run_directory import RECIPE, method_directory, read_recipe
from prunekit.serving import PromptRoutedPipeline
from prunekit.serving.experts import Experts, Mixture
from prunekit.serving.prompts import shipped_prompts

MOST_EXAMPLES = 6
EXAMPLES = "aptp-coco"  # shipped list for a run without generated pictures


def open_dense(directory: Path, pipeline: PromptRoutedPipeline) -> tuple[PromptRoutedPipeline | None, str]:
    """Return a pipeline of the dense model with the pruned pipeline's other parts, or None and the reason."""
    name = pipeline.mixture.info.get("model")
    if name is None:
        return None, f"{directory} does not say which dense model it was cut from."
    settings = read_recipe(directory) if (directory / RECIPE).is_file() else {}
    device, dtype = pipeline.vae.device, pipeline.vae.dtype
    try:
        model = denoiser_in(load_pipeline_of({**settings, "model": name}, dtype)).to(device)
    except (OSError, ValueError) as error:
        return None, f"The dense model {name!r} is not here: {' '.join(str(error).split()).rstrip('.')}."
    size = sum(parameter.numel() for parameter in model.parameters())
    experts = Experts(lambda index, device, dtype: model.to(device, dtype), lambda index: size, 1, device, dtype)
    dense = PromptRoutedPipeline.of(pipeline.parts, Mixture(experts, guidance=pipeline.mixture.guidance))
    return dense, ""


@dataclass(frozen=True)
class Chosen:
    """An expert's architecture, its cost model, and the places and the legend of its drawing."""

    cost: CostModel
    architecture: Architecture
    places: Mapping[str, Place]
    legend: str


def architectures_of(directory: Path, pipeline: PromptRoutedPipeline) -> list[Chosen | None]:
    """Return each expert's architecture; None for an expert without a record of its cut."""
    info = pipeline.mixture.info
    architectures: list[Chosen | None] = []
    result = None
    if (directory / RECIPE).is_file():
        result = PruneResult.load(method_directory(directory, info["method"]))
    for index in range(pipeline.num_experts):
        with pipeline.mixture.experts.use(index) as unet:
            record, shape, size = architecture_of(unet), blank_copy(unet), latent_size(unet)
        del unet  # or it would stay in memory while the next one is loaded
        if result is not None:
            architecture = result.architectures[index]
        elif record is not None:
            architecture = read_pruning(record, discover(shape, "blocks"))
        else:
            architectures.append(None)
            continue
        denoiser = denoiser_of(shape)
        cost = CostModel(shape, architecture.space, size, pipeline.text_length)
        architectures.append(Chosen(cost, architecture, denoiser.outline(shape), denoiser.legend))
    return architectures


def shares_of(chosen: Chosen) -> Mapping[str, float | None]:
    """Return the share of each layer's removable MACs that stays, as the report draws it."""
    return retained(chosen.cost, chosen.architecture, chosen.places)


def example_prompts(directory: Path, pipeline: PromptRoutedPipeline) -> list[str]:
    """Return a few prompts of the run's generated pictures, from each expert in turn.

    Without such pictures: captions of the embedded data for the embedded model, or else prompts of a shipped list.
    """
    prompts: dict[str, None] = {}
    for path in sorted(directory.glob(f"samples/*/**/{REQUEST}")):
        prompts |= dict.fromkeys(read_json(path).get("prompts", ()))
    if not prompts and pipeline.mixture.info.get("model") in EMBEDDED_DIRECTORIES:
        prompts = dict.fromkeys(load_data(DataConfig(kind=EMBEDDED), 0).names)
    if not prompts:
        return shipped_prompts(EXAMPLES)[:MOST_EXAMPLES]
    return of_every_expert(list(prompts), pipeline)


def of_every_expert(prompts: list[str], pipeline: PromptRoutedPipeline) -> list[str]:
    """Return at most MOST_EXAMPLES of the prompts: the first of each expert, then the second of each, and so on."""
    by_expert: dict[int, list[str]] = {}
    for prompt, expert in zip(prompts, pipeline.route(prompts).tolist(), strict=True):
        by_expert.setdefault(expert, []).append(prompt)
    turns = torch.tensor(
        [[turn, expert] for expert in sorted(by_expert) for turn in range(len(by_expert[expert]))]
    ).tolist()
    return [by_expert[expert][turn] for turn, expert in sorted(turns)[:MOST_EXAMPLES]]


def title_of(directory: Path, info: Mapping[str, Any]) -> str:
    """Return the title of the page."""
    name = read_recipe(directory).get("name") if (directory / RECIPE).is_file() else None
    return str(name or directory.resolve().name) + (f": {info['method']}" if info.get("method") else "")
