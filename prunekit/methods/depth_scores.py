"""Score whole layers and their parts on one scale: the measured change of the UNet's output.

The papers whose scores we use prune widths only and have no rule for whole layers, so this rule is our own. The score
of a depth unit is the change of the dense UNet's output when this unit alone is removed: the mean squared change over
the calibration samples. The gate that removes it is the one for which the masked and the sliced UNet agree (law 1). A
sum over weights cannot replace this measurement: a layer matters if it adds much to the hidden state, and the size of
its weights does not tell how much it adds.

Width scores have another unit (a norm, or a first-order change of the loss), but `select` ranks both kinds together. So
we also measure the change when all units of a width group are removed at once, and multiply all width scores by one
factor: the median over groups of (measured change) / (sum of the group's scores). The scores of a typical group then
add up to the output change of emptying the group, so both kinds of scores are output changes. One common factor does
not change the method's ranking of the widths. The factor is a median, because a few groups with scores near zero would
dominate a mean. The changes of several removals do not add up exactly; this holds for every score of single units.
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
    """Return the work of `output_changes` for these groups; none in a space without depth units."""
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
    """Return scores of widths and depths on one scale, (D,) float64; without depth units, the widths unchanged.

    Args:
        widths: (num_width,), a method's scores, not negative.
        pipeline: a pipeline or its UNet.
        space: the units.
        data: calibration data; None: random inputs.
        samples: number of calibration samples.
        seed: seed of the calibration samples.

    Raises:
        ValueError: as in `output_changes`; or no emptied group with scores changes the output, so that no scale exists.

    """
    if not space.num_depth:
        return widths.double()
    changes = output_changes(pipeline, space, space.groups, data, samples, seed)
    num_groups = len(space.width_groups)
    scale = width_scale(widths, changes[:num_groups], space) if num_groups else 1.0
    return torch.cat([widths.double() * scale, changes[num_groups:]])


def width_scale(widths: Tensor, changes: Tensor, space: UnitSpace) -> float:
    """Return the factor from width scores (num_width,) to output changes; changes: of the emptied groups, (groups,).

    Groups whose scores or change are zero are ignored.
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
    """Return the mean squared change of the dense UNet's output when one group alone is emptied, (groups,) float64.

    The mean is over output elements and samples; `span` is the part of the schedule from which their timesteps come.
    Batches are fixed by index and added in order, so the result is bit-identical for any number of processes.

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
    """Return the rank of every unit within its width group, or among all depth units, as a fraction in (0, 1]."""
    pools = [space.slice(group) for group in space.width_groups]
    pools += [slice(space.num_width, space.size)] if space.num_depth else []
    ranks = torch.empty_like(values)
    for pool in pools:
        order = values[pool].argsort(stable=True).argsort()
        ranks[pool] = (order + 1).double() / len(order)
    return ranks
