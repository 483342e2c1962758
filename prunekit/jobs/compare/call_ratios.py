"""Time of a pruned model's call relative to the dense model's, interleaved in one process so that drift cancels."""

from pathlib import Path

import torch
from torch import nn

from prunekit.core.call import Call, predict
from prunekit.core.registry import denoiser_in, denoiser_name, family_of
from prunekit.core.timesteps import TimestepModel, read_denoiser, sampled_timesteps
from prunekit.jobs.stages import Stages
from prunekit.measuring.interleaved import WarmUp, measure
from prunekit.report.comparison_table import Result
from prunekit.runtime.run_directory import WORK

PAIRS = 15
PICTURES = 8  # pictures per timed call
WARM_UP = WarmUp(max_seconds=10.0)


@torch.no_grad()
def call_ratio(dense: nn.Module, pruned: nn.Module, call: Call) -> float:
    """Return the median over pairs of (time of a pruned call) / (time of the dense call in the pair)."""
    calls = {"dense": lambda: predict(dense, call), "pruned": lambda: predict(pruned, call)}
    return measure(calls, PAIRS, call.device, WARM_UP).ratio("pruned").value


def cell_ratio(cell: Result, directory: Path, stages: Stages) -> float | None:
    """Return a cell's call ratio, averaged over experts by training prompts; None if the models are missing."""
    models = directory / WORK / cell["models_folder"]
    shares = [expert["training_share"] for expert in cell["experts"]] or [1.0]
    folders = [models / str(index) / denoiser_name(stages.pipeline) for index in range(len(shares))]
    if not all(folder.is_dir() for folder in folders):
        return None
    samples, _ = stages.agreement
    dense = denoiser_in(stages.pipeline)
    count = family_of(dense).call_batch(min(PICTURES, samples.call.batch), guided=True)
    call = samples.call.take(torch.arange(count) % samples.call.batch).to(dense)
    timesteps = sampled_timesteps(stages.pipeline.scheduler, stages.recipe.evaluation.steps)
    total = 0.0
    for folder, share in zip(folders, shares, strict=True):
        if share:
            expert = read_denoiser(folder).to(dense.device).eval()
            parts = [(expert, 1.0)]
            if isinstance(expert, TimestepModel):
                parts = list(zip(expert.slices, map(float, expert.bins.shares(timesteps)), strict=True))
            total += share * sum(part * call_ratio(dense, model, call) for model, part in parts)
    return total
