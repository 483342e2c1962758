"""The settings that all methods share."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prunekit.methods.latency_budget import LatencySettings
from prunekit.runtime.errors import UserError


class PruneSettings(BaseModel):
    """Settings of all methods; the `Config` of a method adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    budget: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="Fraction of the dense model's exact MACs to keep, averaged over training prompts; or "
        "{latency: 0.7, device: here}: fraction of the dense model's time.",
    )
    latency: LatencySettings | None = Field(
        None,
        description="Device and conditions of the measured time for a budget of time; unset: the budget counts MACs.",
    )
    align: Literal[8, 16, 32, 64] | None = Field(
        None,
        description="Every cut width is a multiple of this number of channels; unset: any width. No effect on methods "
        "that remove only whole layers.",
    )
    depth: Literal["aptp", "all", "blocks", "none"] = Field("aptp", description="Whole layers that may be removed.")
    include: str | list[str] | None = Field(None, description="Globs over module paths to prune; unset: all.")
    exclude: str | list[str] | None = Field(None, description="Globs over module paths that are not pruned.")
    convention: Literal["exact", "conv_linear", "aptp"] = Field("exact", description="Count of MACs.")
    resolution: int | tuple[int, int] | None = Field(
        None, description="Image side, or (height, width), in pixels at which MACs are counted; unset: the model's own."
    )
    text_length: int | None = Field(
        None, ge=1, description="Number of text tokens at which MACs are counted; unset: the tokenizer's maximum."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all random numbers of the method.")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("budget"), Mapping):
            latency = dict(data["budget"])
            if "latency" not in latency:
                raise UserError(f"budget={latency}: give a number, or a mapping with `latency`, the share of the time")
            data = {**data, "budget": latency.pop("latency"), "latency": latency}
        for name in data if isinstance(data, dict) else ():
            if name not in cls.model_fields:
                near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise UserError(f"unknown setting {name!r}{hint} Settings: {', '.join(cls.model_fields)}")
        return data
