"""Scores of whole layers beside scores of their parts: the measured change of the UNet's output, for both.

The papers whose scores we use prune widths only and have no rule for depths; ours is this. A depth unit scores what
its removal alone does to the output of the dense UNet: the mean squared change over the calibration samples, with the
very gate under which masked is sliced. No sum over weights can say that: whether a layer matters depends on how much
it adds to the hidden state that passes by, which its weights' size does not tell.

Width scores come in another unit (a norm, a first-order change of the loss), and `select` ranks both together. So we
also measure the change when all units of a width group go at once, and multiply all width scores by one factor: the
median over groups of (measured change) / (sum of the group's scores). After it, the scores of a typical group add up
to what emptying it does to the output, so both kinds are changes of the output. One common factor leaves the ranking
of the widths among each other exactly as the method made it; the median, not the mean, because a few groups whose
method scores are nearly zero would otherwise decide it. Changes of several removals do not add up exactly, which is
true of every score of single units.
"""

from collections.abc import Iterator, Sequence

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from prunekit.core.call import predict
from prunekit.core.gates import Gates, gated
from prunekit.core.registry import denoiser_in
from prunekit.core.space import UnitGroup, UnitSpace
from prunekit.data.encoded import EncodedData
from prunekit.methods.calibration import (
    CalibrationBatch,
    calibration_batches,
    evaluation_mode,
    num_probes,
)
from prunekit.methods.workload import Calibration
from prunekit.runtime.errors import UserError
from prunekit.runtime.processes import current


def depth_calibrations(space: UnitSpace, groups: Sequence[UnitGroup], samples: int) -> tuple[Calibration, ...]:
    """Return what `output_changes` of these groups computes; nothing in a space without depth units."""
    if not space.num_depth:
        return ()
    passes = len(groups) + 1
    return (Calibration("depth scores", samples, passes, f"{passes} forward passes"),)


def joint_scores(
    widths: Tensor,
    pipeline: DiffusionPipeline | ModelMixin,
    space: UnitSpace,
    data: EncodedData | None,
    samples: int,
    seed: int,
) -> Tensor:
    """Scores of widths and depths on one scale, (D,) float64; the widths as they are where there are no depth units.

    Args:
        widths: (num_width,), a method's scores, not negative.
        pipeline: a pipeline or its UNet.
        space: its units.
        data: calibration data; None: random inputs.
        samples: calibration samples.
        seed: keys their draw.

    Raises:
        ValueError: as `output_changes`; or no emptied group with scores changes the output, so that no scale exists.

    """
    if not space.num_depth:
        return widths.double()
    changes = output_changes(pipeline, space, space.groups, data, samples, seed)
    num_groups = len(space.width_groups)
    scale = width_scale(widths, changes[:num_groups], space) if num_groups else 1.0
    return torch.cat([widths.double() * scale, changes[num_groups:]])


def width_scale(widths: Tensor, changes: Tensor, space: UnitSpace) -> float:
    """The factor from a method's width scores (num_width,) to output changes, from those of emptied groups (groups,).

    Groups whose scores or change are zero have no say.
    """
    sums = torch.stack([widths[space.slice(group)].double().sum() for group in space.width_groups])
    known = (sums > 0) & (changes > 0)
    if not known.any():
        raise UserError(
            "no width group with scores changes the UNet's output when it is emptied, so the scores of widths "
            "and depths cannot be compared. Are the output layers zero? Otherwise use depth='none'"
        )
    return (changes[known] / sums[known]).median().item()


@torch.no_grad()
def output_changes(
    pipeline: DiffusionPipeline | ModelMixin,
    space: UnitSpace,
    groups: Sequence[UnitGroup],
    data: EncodedData | None,
    samples: int,
    seed: int,
    span: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Mean squared change of the dense UNet's output when one group alone goes with all its units, (groups,) float64.

    The mean is over samples, at timesteps in a part of the schedule (`span`), and output elements. Batches are fixed by
    index and added in their order, so the number of processes changes no bit.

    Raises:
        ValueError: an output that is not finite, or more samples than training pairs.

    """
    if not groups:
        return torch.zeros(0, dtype=torch.float64)
    model, rows = denoiser_in(pipeline), num_probes(pipeline, data)
    processes = current()
    batch_size = min(samples, rows)
    share = (processes.index, processes.count)
    batches = calibration_batches(pipeline, data, samples, batch_size, seed, share=share, span=span)
    table = torch.zeros(-(-samples // batch_size), len(groups), dtype=torch.float64)  # sums over a batch's samples
    probes = torch.ones(len(groups), space.size)
    for row, group in zip(probes, groups, strict=True):
        row[space.slice(group)] = 0
    with evaluation_mode(model), gated(model, space) as gates:
        for batch in batches:
            changes = _changes(model, gates, batch, probes.split(max(1, rows // batch_size)))
            table[batch.index] = torch.cat(list(changes)).cpu()
    processes.sum([table])
    if not table.isfinite().all():
        raise UserError("the UNet's output is not finite on the calibration inputs; use float32")
    return table.sum(0) / samples


def _changes(model: ModelMixin, gates: Gates, batch: CalibrationBatch, chunks: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield, for each chunk of gates (P, D), the squared changes (P,) summed over the batch's samples."""
    gates.set(gates.space.full())
    dense = predict(model, batch.call).float()  # (B, C, h, w)
    for probes in chunks:
        num = len(probes)
        gates.set(probes, rows=torch.arange(num).repeat_interleave(len(batch)))
        output = predict(model, batch.call.repeat(num)).float()
        errors = (output.view(num, *dense.shape) - dense).square()  # (P, B, C, h, w)
        yield errors.flatten(2).mean(2, dtype=torch.float64).sum(1)


def ranks(values: Tensor, space: UnitSpace) -> Tensor:
    """Rank of every unit in its width group, or among all depth units, as a share above 0 and at most 1."""
    pools = [space.slice(group) for group in space.width_groups]
    pools += [slice(space.num_width, space.size)] if space.num_depth else []
    ranks = torch.empty_like(values)
    for pool in pools:
        order = values[pool].argsort(stable=True).argsort()
        ranks[pool] = (order + 1).double() / len(order)
    return ranks
