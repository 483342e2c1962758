"""How long a pruned UNet's call takes against the dense one's: interleaved in one process, so that drift cancels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.compare.cells import WORK
from prunekit.compare.fairness import Result
from prunekit.slicing import PrunedUNet2DConditionModel
from prunekit.stages import Stages
from prunekit.timing import WarmUp, measure

TIMINGS = "timings.json"  # of a comparison
PAIRS = 15
WARM_UP = WarmUp(max_seconds=10.0)


@torch.no_grad()
def call_ratio(dense: nn.Module, pruned: nn.Module, inputs: Mapping[str, Any]) -> float:
    """Return the median over pairs of (time of a pruned call) / (time of the dense call beside it)."""
    calls = {"dense": lambda: dense(**inputs), "pruned": lambda: pruned(**inputs)}
    return measure(calls, PAIRS, inputs["sample"].device, WARM_UP).ratio("pruned").value


def cell_ratio(cell: Result, directory: Path, stages: Stages) -> float | None:
    """Return a cell's call ratio, the mean over its experts by their training prompts; None where models are gone."""
    models = directory / WORK / cell["models_folder"]
    folders = [models / str(index) / "unet" for index in range(cell["models"])]
    if not all(folder.is_dir() for folder in folders):
        return None
    samples, _ = stages.agreement
    count = 2 * min(8, len(samples.noisy))  # a batch of 8 with guidance
    rows = torch.arange(count) % len(samples.noisy)
    unet = stages.pipeline.unet
    inputs = samples.inputs(rows, next(unet.parameters()))
    shares = [expert["training_share"] for expert in cell["experts"]] or [1 / cell["models"]] * cell["models"]
    total = 0.0
    for folder, share in zip(folders, shares, strict=True):
        if share:
            expert = PrunedUNet2DConditionModel.from_pretrained(folder).to(unet.device).eval()
            total += share * call_ratio(unet, expert, inputs)
    return total
