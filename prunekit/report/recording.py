"""What the page needs and no stage keeps: written beside the figures of a run, once."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import prunekit
from prunekit.cost import CostModel
from prunekit.evaluation.agreement import AgreementSamples, data_samples, predictions
from prunekit.gates import gated
from prunekit.methods.base import PruneResult
from prunekit.models.shapes import unet_from_config
from prunekit.report.routing import mapped_rows, prompt_map
from prunekit.run_directory import METHODS, RESULT
from prunekit.slicing import slice_unet
from prunekit.stages import Stages
from prunekit.training.checkpoint import write_json
from prunekit.training.diffusion import forward_process

ENVIRONMENT = "environment.json"
CHECKED_SAMPLES = 2


def record(directory: Path, stages: Stages) -> None:
    """Write what is missing of a finished run: its environment, and each method's certificate and map of prompts."""
    metrics = directory / "metrics"
    if not (directory / ENVIRONMENT).is_file():
        own = {"prunekit": _version(), **stages.environment, "dtype": str(stages.pipeline.unet.dtype)}
        write_json(directory / ENVIRONMENT, {**own, "weights": stages.model_digest, "data": stages.data.key})
    for name in stages.recipe.methods:
        folder = directory / METHODS / name
        if not (folder / RESULT).is_file():
            continue
        result = PruneResult.load(folder, stages.pipeline.unet)
        path = metrics / f"{name}.certificate.json"
        if not path.is_file():
            samples = data_samples(stages.data, forward_process(stages.pipeline.scheduler), 0, CHECKED_SAMPLES)
            write_json(path, certify(stages.pipeline.unet, result, samples))
        path = metrics / f"{name}.map.json"
        if result.router is not None and not path.is_file():
            pairs = stages.data.training_pairs()
            drawn = pairs[mapped_rows(len(pairs), stages.recipe.seed)]
            prompts, captions = stages.data.prompts[drawn], [stages.data.images.captions[i] for i in drawn.tolist()]
            write_json(path, prompt_map(prompts, captions, result.router.route(prompts), len(pairs)))


@torch.no_grad()
def certify(unet: Any, result: PruneResult, samples: AgreementSamples) -> dict[str, Any]:
    """Hold each architecture's cut UNet against the dense one under its masks, and its cost against a count.

    errors: greatest difference of the outputs over the greatest output, in the dense UNet's precision, before any
    fine-tuning. predicted: the cost model's exact MACs; counted: torch's FlopCounterMode / 2 on the cut UNet.
    """
    size, length = tuple(samples.noisy.shape[-2:]), samples.text.shape[1]
    cost = CostModel(unet, result.space, size, length)
    hollow = unet_from_config({k: v for k, v in unet.config.items() if not k.startswith("_")}, "the run")
    found: dict[str, Any] = {"errors": [], "predicted": [], "counted": [], "sample_size": size, "text_length": length}
    for architecture in result.architectures:
        with gated(unet, result.space) as gates:
            gates.set(architecture)
            masked = predictions(unet, samples)
        difference = (predictions(slice_unet(unet, architecture).eval(), samples) - masked).abs().max()
        found["errors"].append(float(difference / masked.abs().max().clamp_min(1e-12)))
        found["predicted"].append(cost.macs(architecture))
        found["counted"].append(_counted(slice_unet(hollow, architecture), samples))
    return found


def _counted(unet: Any, samples: AgreementSamples) -> int:
    """Return the MACs of one call, batch 1, of a UNet on the meta device."""
    inputs = samples.inputs(torch.zeros(1, dtype=torch.long), torch.empty(0, device="meta"))
    with FlopCounterMode(display=False) as counter:
        unet(**inputs)
    return counter.get_total_flops() // 2


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(prunekit.__name__)
    except PackageNotFoundError:
        return "unknown"
