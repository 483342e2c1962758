"""How long a pruned UNet's call takes against the dense one's: interleaved in one process, so that drift cancels."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from prunekit.compare.fairness import Result
from prunekit.slicing import PrunedUNet2DConditionModel
from prunekit.stages import Stages

PAIRS = 15


@torch.no_grad()
def call_ratio(dense: nn.Module, pruned: nn.Module, inputs: Sequence[Tensor], pairs: int = PAIRS) -> float:
    """Return the median over pairs of (time of a pruned call) / (time of the dense call beside it)."""

    def seconds(unet: nn.Module) -> float:
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        unet(*inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for unet in (dense, pruned):
        seconds(unet)
    return statistics.median(seconds(pruned) / seconds(dense) for _ in range(pairs))


def cell_ratio(cell: Result, directory: Path, stages: Stages) -> float | None:
    """Return a cell's call ratio, the mean over its experts by their training prompts; None where models are gone."""
    folders = sorted((directory / "work" / cell["models_folder"]).glob("*/unet"), key=lambda p: int(p.parent.name))
    if len(folders) != cell["models"]:
        return None
    samples, _ = stages.agreement
    count = 2 * min(8, len(samples.noisy))  # a batch of 8 with guidance
    rows = torch.arange(count) % len(samples.noisy)
    unet = stages.pipeline.unet
    inputs = [x[rows].to(unet.device) for x in (samples.noisy, samples.timesteps, samples.text)]
    shares = [expert["training_share"] for expert in cell["experts"]] or [1.0]
    total = 0.0
    for folder, share in zip(folders, shares, strict=True):
        if share:
            expert = PrunedUNet2DConditionModel.from_pretrained(folder).to(unet.device).eval()
            total += share * call_ratio(unet, expert, inputs)
    return total
