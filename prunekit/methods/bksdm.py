"""BK-SDM: remove whole layers by a fixed rule (Kim et al., BK-SDM: A Lightweight, Fast, and Cheap Version of SD, 2023).

Base removes the second ResBlock and Transformer layer of every down block and of every up block. Small also removes the
mid block, and Tiny also the innermost level. The other members of the family remove second layers only from some
levels, and some of these also remove the mid block.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import Field, field_validator

from prunekit.core.cost import CostModel
from prunekit.core.registry import denoiser_in, denoiser_of
from prunekit.core.space import Architecture, UnitSpace, near
from prunekit.denoisers.unet.bksdm import Levels
from prunekit.methods.base import Dataset, Method, budget_cost, describe_result, space_of
from prunekit.methods.registry import register
from prunekit.methods.result import PruneResult
from prunekit.methods.settings import PruneSettings
from prunekit.runtime.errors import UserError
from prunekit.training.trainer import Log

NAMED = ("base", "small", "tiny")
NO_MID = "-mid"  # suffix of a variant whose mid block is removed too
_LAYERS = re.compile(rf"\d+(,\d+)*({NO_MID})?")


class BKSDMSettings(PruneSettings):
    """Settings of BK-SDM."""

    depth: Literal["aptp", "all", "blocks", "none"] = Field(
        "blocks", description="No effect: the family is defined over whole layers and stages."
    )
    variant: str | None = Field(
        None,
        description="Member: 'base', 'small', 'tiny', or the layers per down block, outermost first, "
        "such as '2,1,1,1', with the suffix '-mid' to remove the mid block too; unset: the "
        "largest member within the budget.",
    )
    own_distillation: bool = Field(
        False,
        description="Fine-tune with BK-SDM's distillation: task, output, and down and up blocks, each with weight 1, "
        "without min-SNR weights.",
    )

    @field_validator("depth")
    @classmethod
    def _whole_layers(cls, value: str) -> str:
        return "blocks"  # a recipe gives one `depth` to all its methods, so another value is not an error

    @field_validator("variant", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> str | None:
        if value is None:
            return None
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        text = text.replace(" ", "").lower()
        if text not in NAMED and not _LAYERS.fullmatch(text):
            raise UserError(
                f"variant={value!r}: choose {', '.join(map(repr, NAMED))}, or the layers per down block, as '2,1,1,1' "
                f"or '2,1,1,1{NO_MID}'.{near(text, NAMED)}"
            )
        return text


@register("bksdm")
class BKSDM(Method):
    """Remove whole layers by BK-SDM's rule: the largest member of its family within the budget (Kim et al., 2023)."""

    Config = BKSDMSettings
    config: BKSDMSettings
    needs_data = False
    smoke: ClassVar[Mapping[str, int | None]] = {"variant": None}

    def members(self, pipeline: DiffusionPipeline | ModelMixin) -> dict[str, Architecture]:
        """Return the family's members for a UNet, by name: Architectures over the "blocks" space.

        The UNet may be on the meta device. "base", "small" and "tiny" come first, then the layers per down block
        ("2,1,1,1", outermost first), with "-mid" where the mid block is removed as well. A level is reduced from two
        layers to one by removing the second layer of its down block and of its up block. Members that the UNet or the
        settings' include and exclude do not allow are left out, such as "tiny" where the two innermost levels differ in
        width.

        Raises:
            ValueError: a UNet with a level of other than one or two layers.

        """
        _levels(denoiser_in(pipeline))  # raises if there are no levels
        return _members(denoiser_in(pipeline), space_of(pipeline, self.config))

    def architecture(self, pipeline: DiffusionPipeline | ModelMixin) -> Architecture:
        """Return the Architecture of the settings' `variant`, for any budget; if it is unset, the choice of `prune`.

        Args:
            pipeline: a pipeline or its UNet, which may be on the meta device.

        Raises:
            ValueError: a variant that this UNet cannot have (the message names those it has), or as in `prune`.

        """
        if self.config.variant is None:
            return self.prune(pipeline).architectures[0]
        return self._fixed(denoiser_in(pipeline), self.members(pipeline))[1]

    def choose(
        self,
        pipeline: DiffusionPipeline | ModelMixin,
        dataset: Dataset | None,
        directory: Path | None,
        log: Log | None,
    ) -> PruneResult:
        """Choose the variant of the settings or, without one, the most expensive member within the budget.

        Among members of the same cost, choose the one with the most parameters. `info.variant` is the name of the
        member, and `info.ratio` its MACs as a fraction of the dense MACs.

        Args:
            pipeline: a pipeline or its UNet, which may be on the meta device.
            dataset: not used.
            directory: not used.
            log: not used.

        Raises:
            ValueError: no member is within the budget, or the variant is not within a budget that was given (the
                messages have the costs); a variant that this UNet cannot have.

        """
        model = denoiser_in(pipeline)
        _levels(model)  # raises if there are no levels
        cost = budget_cost(pipeline, self.config)
        members = _members(model, cost.space)
        if self.config.variant is None:
            name, architecture = _largest(members, cost, self.config.budget)
        else:
            name, architecture = self._fixed(model, members)
            self._check_budget(name, architecture, cost)
        info = describe_result(self, [architecture], cost)
        info.variant = name
        return PruneResult([architecture], info=info)

    def fine_tuning(self) -> dict[str, Any]:
        """Return BK-SDM's losses if `own_distillation`: task, output, features, each of weight 1 (Kim et al., 2023).

        BK-SDM has no min-SNR weights, so a recipe's `snr_gamma` does not apply.
        """
        if not self.config.own_distillation:
            return {}
        return {"denoising_weight": 1.0, "distillation_weight": 1.0, "feature_blocks": "down_up", "snr_gamma": None}

    def _fixed(self, model: ModelMixin, members: dict[str, Architecture]) -> tuple[str, Architecture]:
        variant = self.config.variant
        ones = (1,) * len(_levels(model).layers)
        name = "base" if variant == _written(ones, False) else "small" if variant == _written(ones, True) else variant
        if name not in members:
            _require(members)
            hint = near(str(name), members)
            raise UserError(f"variant={variant!r} is not possible on this UNet.{hint}. It has: {'; '.join(members)}")
        return name, members[name]

    def _check_budget(self, name: str, member: Architecture, cost: CostModel) -> None:
        """Raise ValueError if the settings give both a variant and a budget, and the variant exceeds the budget."""
        budget = self.config.budget
        if "budget" in self.config.model_fields_set and not _fits(member, cost, budget):
            raise UserError(
                f"variant={name!r} costs {_share(member, cost):.4f} of the dense UNet, above budget={budget}; raise "
                "the budget, or leave variant unset to get the largest member within it"
            )


def _require(members: dict[str, Architecture]) -> None:
    """Raise UserError if a UNet has no members, because of its shape or of the settings' include and exclude."""
    if not members:
        raise UserError("BK-SDM's rule cannot remove anything from this UNet")


def _fits(member: Architecture, cost: CostModel, budget: float) -> bool:
    return cost.total(member) <= Fraction(repr(float(budget))) * cost.dense_total  # the exact decimal of the setting


def _share(member: Architecture, cost: CostModel) -> float:
    return cost.total(member) / cost.dense_total


def _largest(members: dict[str, Architecture], cost: CostModel, budget: float) -> tuple[str, Architecture]:
    _require(members)
    within = [name for name, member in members.items() if _fits(member, cost, budget)]
    if not within:
        cheapest = sorted(members, key=lambda name: cost.total(members[name]))[:3]
        listed = ", ".join(f"{name!r} at {_share(members[name], cost):.4f}" for name in cheapest)
        raise UserError(
            f"budget={budget} is below every member of BK-SDM's family on this UNet; the nearest are {listed} of the "
            f"dense {cost.unit}"
        )
    name = max(within, key=lambda name: (cost.total(members[name]), cost.params(members[name])))
    return name, members[name]


def _members(model: ModelMixin, space: UnitSpace) -> dict[str, Architecture]:
    levels = _levels(model)
    layers = levels.layers
    if not set(layers) <= {1, 2}:
        raise UserError(
            "BK-SDM's rule is for UNets with one or two layers in every down block; this one has "
            f"{','.join(map(str, layers))}"
        )
    second = [
        _droppable(space, names) if count == 2 else [] for names, count in zip(levels.second, layers, strict=True)
    ]
    mid = _droppable(space, levels.mid or ())
    members: dict[str, Architecture] = {}
    for thin in itertools.product(*[(False, True) if names else (False,) for names in second]):
        counts = tuple(count - is_thin for count, is_thin in zip(layers, thin, strict=True))
        names = list(itertools.chain.from_iterable(itertools.compress(second, thin)))
        if names:
            members[_name(counts, False)] = _without(space, names)
        if mid:
            members[_name(counts, True)] = _without(space, names + mid)
    if tiny := _tiny(levels, space, second, mid):
        members["tiny"] = _without(space, tiny)
    order = sorted(members, key=lambda name: NAMED.index(name) if name in NAMED else len(NAMED))
    return {name: members[name] for name in order}


def _tiny(levels: Levels, space: UnitSpace, second: list[list[str]], mid: list[str]) -> list[str]:
    """Return the layers that Tiny removes: Small's and the innermost stage; none if one of them cannot be removed."""
    stage = _droppable(space, [levels.innermost])
    all_thin = all(names or count == 1 for count, names in zip(levels.layers, second, strict=True))
    if not stage or not all_thin or (levels.mid is not None and not mid):
        return []
    return [*itertools.chain.from_iterable(second), *mid, *stage]


def _name(counts: tuple[int, ...], without_mid: bool) -> str:
    if set(counts) == {1}:
        return "small" if without_mid else "base"
    return _written(counts, without_mid)


def _written(counts: tuple[int, ...], without_mid: bool) -> str:
    return ",".join(map(str, counts)) + (NO_MID if without_mid else "")


def _levels(model: ModelMixin) -> Levels:
    """Return a UNet's levels; raise UserError for a denoiser without levels."""
    levels = getattr(denoiser_of(model), "levels", None)
    if levels is None:
        raise UserError(f"bksdm thins the levels of a UNet, and {type(model).__name__} has none; choose another method")
    return levels(model)


def _droppable(space: UnitSpace, names: Sequence[str]) -> list[str]:
    """Return the names if all of them are depth units of the space, else an empty list."""
    known = {group.name for group in space.depth_groups}
    return list(names) if known.issuperset(names) else []


def _without(space: UnitSpace, names: list[str]) -> Architecture:
    values = torch.ones(space.size, dtype=torch.bool, device="cpu")
    for name in names:
        values[space.slice(name)] = False
    return Architecture(space, values)
