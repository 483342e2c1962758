"""Magnitude pruning: the parts with the smallest weights go (Li et al., Pruning Filters for Efficient ConvNets, 2017).

It is one-shot and, as in the rows that APTP compares with, ranks all units together. Those rows also cut channels of
the residual stream; here, as for every method, block outputs keep their shape, so this Norm is the milder one.
"""

from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn

from prunekit.methods.base import PruneSettings, ScoreMethod, space_of, unet_of
from prunekit.methods.budget import Scores
from prunekit.methods.registry import register
from prunekit.methods.weights import covered_weights, sum_per_unit
from prunekit.units import UnitGroup, UnitSpace


class NormSettings(PruneSettings):
    """Settings of Norm."""

    order: Literal[1, 2] = Field(2, description="Power of the weights that is summed: 1 (L1) or 2 (L2).")
    scope: Literal["global", "layer"] = Field(
        "global", description="Rank all units together, or remove the same share of every layer."
    )


@register("norm")
class Norm(ScoreMethod):
    """Remove the units whose weights are smallest, without data (Li et al., 2017)."""

    Config = NormSettings
    needs_data = False

    @torch.no_grad()
    def score(self, pipeline: DiffusionPipeline | UNet2DConditionModel, dataset: Any = None) -> Scores:
        """Relative magnitude of every unit.

        A width unit scores the sum of |w|^order over the weights it owns, relative to the mean of its group: equal
        to torch-pruning's MagnitudeImportance(p=order), so that layers of different size and scale compare. A depth
        unit scores the magnitude of its own weights relative to the mean of the depth units of its kind, where a
        matrix counts fan_in^(order/2) x mean |w|^order, which does not depend on its width.

        Scope "layer" replaces the scores by ranks within their group, so that a budget takes the same share of each;
        depth units rank among all depth units.

        Args:
            pipeline: a pipeline or its UNet; its weights must be there, not on the meta device.
            dataset: not used.

        Raises:
            ValueError: a UNet on the meta device, or units that the settings name and the UNet lacks.

        """
        unet, space = unet_of(pipeline), space_of(pipeline, self.config)
        if unet.device.type == "meta":
            raise ValueError("Norm reads the weights, and this UNet is on the meta device; load it with its weights")
        order = self.config.order
        values = torch.empty(space.size, dtype=torch.float64)
        for group in space.width_groups:
            values[space.slice(group)] = sum_per_unit(unet, group, lambda weight: weight.double().abs() ** order)
        for group in space.depth_groups:
            values[space.slice(group)] = _scale_free(covered_weights(unet, group), order)
        for pool in _pools(unet, space):
            values[pool] /= values[pool].mean().clamp_min(torch.finfo(torch.float64).tiny)
        if self.config.scope == "layer":
            values = _ranks(values, space)
        return Scores(space, values, {"method": self.name, "settings": self.config.model_dump(mode="json")})


def _scale_free(weights: list[nn.Parameter], order: int) -> float:
    means = [weight[0].numel() ** (order / 2) * (weight.double().abs() ** order).mean() for weight in weights]
    return torch.stack(means).mean().item()


def _pools(unet: UNet2DConditionModel, space: UnitSpace) -> list[Tensor]:
    """Positions of the units that are measured against each other: a width group, or the depth units of one kind."""
    pools = [torch.arange(space.size)[space.slice(group)] for group in space.width_groups]
    kinds: dict[str, list[int]] = {}
    for group in space.depth_groups:
        kinds.setdefault(_depth_kind(unet, group), []).append(space.slice(group).start)
    return pools + [torch.tensor(positions) for positions in kinds.values()]


def _depth_kind(unet: UNet2DConditionModel, group: UnitGroup) -> str:
    return group.kind if group.kind == "stage" else type(unet.get_submodule(group.path)).__name__


def _ranks(values: Tensor, space: UnitSpace) -> Tensor:
    """Rank of every unit in its width group, or among all depth units, as a share above 0 and at most 1."""
    pools = [space.slice(group) for group in space.width_groups]
    pools += [slice(space.num_width, space.size)] if space.num_depth else []
    ranks = torch.empty_like(values)
    for pool in pools:
        order = values[pool].argsort(stable=True).argsort()
        ranks[pool] = (order + 1).double() / len(order)
    return ranks
