"""Recover experts in memory: slice each architecture and fine-tune it on the prompts routed to it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from prunekit.core.registry import denoiser_in
from prunekit.core.slicing import slice_model
from prunekit.core.timesteps import TimestepModel
from prunekit.data.encoded import EncodedData
from prunekit.methods.result import PruneResult
from prunekit.recovery.backbone import BackboneObjective, Mixture
from prunekit.recovery.fine_tuning import FineTuneConfig, fine_tune
from prunekit.runtime.errors import UserError

BACKBONE = "backbone"


def recover_experts(
    result: PruneResult,
    pipeline: DiffusionPipeline,
    data: EncodedData,
    config: FineTuneConfig,
    directory: str | Path | None = None,
    seed: int = 0,
) -> list[ModelMixin]:
    """Slice a pipeline's UNet to a result's architectures and fine-tune each on the prompts that are routed to it.

    This is the recovery of a run, in memory. The pipeline's UNet does not change.

    Args:
        result: architectures, and the router if there is one.
        pipeline: the dense pipeline.
        data: the encoded pairs.
        config: settings of the fine-tuning.
        directory: folder of the checkpoints, from which an interrupted call resumes; None: a temporary folder.
        seed: seed of the training.

    Returns:
        The fine-tuned models, frozen, on the device of the pipeline's UNet.

    Raises:
        ValueError: as `fine_tune`, and for a directory with the training of another result.

    """
    if directory is None:
        with TemporaryDirectory() as temporary:
            return recover_experts(result, pipeline, data, config, temporary, seed)
    dense, pairs, directory = denoiser_in(pipeline), data.training_pairs(), Path(directory)
    train = partial(fine_tune, teacher=dense, data=data, config=config, scheduler=pipeline.scheduler, seed=seed)
    if shares_backbone(result, config):
        objectives: list[BackboneObjective] = []
        backbone = slice_model(dense, result.space.full())
        build = kept_objective(mixture_of(result, data, pairs), objectives)
        train(backbone, directory=directory / BACKBONE, pairs=pairs, objective=build)
        slices = [member.sliced() for member in objectives[0].members]
        count = len(result.members(0))
        parts = [slices[start : start + count] for start in range(0, len(slices), count)]
        return [part[0] if result.bins is None else TimestepModel(part, result.bins) for part in parts]
    if result.bins is not None:
        raise UserError("experts that depend on the timestep must share their weights: set shared_backbone=true")
    experts, (_, pairs_of) = [], routed_pairs(result, data, pairs)
    for index, (architecture, served) in enumerate(zip(result.architectures, pairs_of, strict=True)):
        experts.append(slice_model(dense, architecture).eval().requires_grad_(False))
        if len(served):
            train(experts[index], directory=directory / str(index), pairs=served, title=f"expert {index}")
    return experts


def routed_pairs(result: PruneResult, data: EncodedData, pairs: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """Return the expert of each of `pairs` (P,), and the training pairs of each architecture.

    Without a router, return None in place of the experts; every architecture then trains on all pairs.
    """
    if result.router is None:
        return None, [pairs for _ in result.architectures]
    routed = result.router.route_rows(data.prompts, pairs)
    return routed, [pairs[routed == index] for index in range(len(result.architectures))]


def shares_backbone(result: PruneResult, config: FineTuneConfig) -> bool:
    """Return whether several architectures are trained as slices of one set of weights."""
    several = len(result.architectures) > 1 and (result.router is not None or result.bins is not None)
    return config.shared_backbone and several


def mixture_of(result: PruneResult, data: EncodedData, pairs: Tensor) -> Mixture:
    """Return the architectures of a result, with the expert that trains on each of `pairs` (P,)."""
    routed, _ = routed_pairs(result, data, pairs)
    experts = torch.zeros(data.images.num_pairs, dtype=torch.long)
    return Mixture(
        result.architectures, experts if routed is None else over_all_pairs(data, pairs, routed), result.bins
    )


def kept_objective(mixture: Mixture, into: list[BackboneObjective]) -> Callable[..., BackboneObjective]:
    """Return a function that builds a backbone's objective and appends it to `into`, for access to its members."""

    def build(*inputs: Any) -> BackboneObjective:
        into.append(partial(BackboneObjective, mixture=mixture)(*inputs))
        return into[-1]

    return build


def over_all_pairs(data: EncodedData, pairs: Tensor, routed: Tensor) -> Tensor:
    """Return the expert of every pair of the data set, (num_pairs,): `routed` (P,) at `pairs` (P,), 0 elsewhere."""
    return routed.new_zeros(data.images.num_pairs).scatter_(0, pairs, routed)
