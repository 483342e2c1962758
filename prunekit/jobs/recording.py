"""Records for the report that no stage writes: environment, certificates, map of prompts, sensitivity to each layer."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import prunekit
from prunekit.core.call import predict
from prunekit.core.cost import CostModel
from prunekit.core.discovery import discover
from prunekit.core.gates import gated
from prunekit.core.registry import denoiser_in, denoiser_of, process_of
from prunekit.core.slicing import slice_model
from prunekit.core.space import Architecture
from prunekit.evaluation.agreement import AgreementSamples, data_samples, predictions
from prunekit.jobs.recipe import CompareRecipe, PruneRecipe
from prunekit.jobs.stages import Stages
from prunekit.methods.result import PruneResult
from prunekit.report.architectures import layers_of
from prunekit.report.routing_map import mapped_rows, prompt_map
from prunekit.report.source import ENVIRONMENT
from prunekit.runtime.files import write_json
from prunekit.runtime.progress import Progress
from prunekit.runtime.randomness import generator
from prunekit.runtime.run_directory import METHODS, RESULT
from prunekit.training.memory import held_like, is_lowered

CHECKED_SAMPLES = 2
SAMPLES = 8
TIMES = 8


def record(directory: Path, stages: Stages) -> None:
    """Write the missing records of a run: its environment, and each method's certificate and map of prompts."""
    metrics, dense = directory / "metrics", denoiser_in(stages.pipeline)
    if not (directory / ENVIRONMENT).is_file():
        environment = {"prunekit": _version(), **stages.environment, "dtype": str(dense.dtype)}
        write_json(directory / ENVIRONMENT, {**environment, "weights": stages.model_digest, "data": stages.data.key})
    assert isinstance(stages.recipe, PruneRecipe | CompareRecipe)
    for name in stages.recipe.methods:
        folder = directory / METHODS / name
        if not (folder / RESULT).is_file():
            continue
        result = PruneResult.load(folder, dense)
        path = metrics / f"{name}.certificate.json"
        if not path.is_file():
            samples = data_samples(stages.data, stages.pipeline, 0, CHECKED_SAMPLES)
            write_json(path, certify(dense, result, samples))
        path = metrics / f"{name}.map.json"
        if result.router is not None and not path.is_file():
            pairs = stages.data.training_pairs()
            drawn = pairs[mapped_rows(len(pairs), stages.recipe.seed)]
            prompts, captions = stages.data.prompts[drawn], [stages.data.images.captions[i] for i in drawn.tolist()]
            write_json(path, prompt_map(prompts, captions, result.router.route(prompts), len(pairs)))


@torch.no_grad()
def certify(model: Any, result: PruneResult, samples: AgreementSamples) -> dict[str, Any]:
    """Compare each architecture's sliced model with the masked dense model, and its predicted MACs with a count.

    The result has lists with one value per architecture:
    errors: largest difference of the outputs divided by the largest output, in `dtype`, before fine-tuning.
    predicted: exact MACs of the cost model. counted: torch's FlopCounterMode / 2 on the sliced model.
    """
    denoiser = denoiser_of(model)
    noisy, length = denoiser.noisy(samples.call), denoiser.text_length(samples.call)
    size = (noisy.shape[-2], noisy.shape[-1])
    cost = CostModel(model, result.space, size, length)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    hollow = denoiser.from_config(config, "the run")
    certificate: dict[str, Any] = {
        "dtype": "bfloat16" if is_lowered(model) else "float32",
        "errors": [],
        "predicted": [],
        "counted": [],
        "sample_size": size,
        "text_length": length,
    }
    for architecture in result.architectures:
        with gated(model, result.space) as gates:
            gates.set(architecture)
            masked = predictions(model, samples)
        cut = held_like(slice_model(model, architecture), model).eval()
        difference = (predictions(cut, samples) - masked).abs().max()
        certificate["errors"].append(float(difference / masked.abs().max().clamp_min(1e-12)))
        certificate["predicted"].append(cost.macs(architecture))
        certificate["counted"].append(_counted(slice_model(hollow, architecture), samples))
    return certificate


def _counted(model: Any, samples: AgreementSamples) -> int:
    """Return the MACs of one call, batch 1, of a model on the meta device."""
    call = samples.call.take(slice(1)).to("meta")
    with FlopCounterMode(display=False) as counter:
        predict(model, call)
    return counter.get_total_flops() // 2


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(prunekit.__name__)
    except PackageNotFoundError:
        return "unknown"


@torch.no_grad()
def measure_sensitivity(stages: Stages, path: Path, samples: int = SAMPLES, times: int = TIMES) -> Path:
    """Measure the prediction's error without each layer at `times` timesteps of `samples` pictures; write JSON."""
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
    """Return the fixed samples at every timestep, timestep by timestep; each sample has one noise for all of them."""
    count = len(timesteps)
    latents = torch.as_tensor(stages.data.latents[stages.data.image_index[fixed.indices]]).cpu().float()
    noise = torch.randn(latents.shape, generator=generator(stages.recipe.seed, "sensitivity"))
    t = torch.tensor(timesteps).repeat_interleave(len(latents))
    noisy = process_of(stages.pipeline).noised(latents.repeat(count, 1, 1, 1), noise.repeat(count, 1, 1, 1), t)
    call = denoiser_of(denoiser_in(stages.pipeline)).at(fixed.call.repeat(count), noisy, t)
    return AgreementSamples(fixed.indices.repeat(count), call)
