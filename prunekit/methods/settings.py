"""The settings that all methods share."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prunekit.methods.latency_budget import LatencySettings
from prunekit.runtime.errors import UserError


class PruneSettings(BaseModel):
    """The settings that all methods have; a method's own `Config` adds to them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    budget: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="Cost to reach, as a share of the dense UNet's MACs; or {latency: 0.7, device: here}: of its time.",
    )
    latency: LatencySettings | None = Field(
        None, description="What the budget's time is measured on; unset: the budget counts MACs."
    )
    align: Literal[8, 16, 32, 64] | None = Field(
        None, description="Channels of which every cut width is a multiple; unset: any. Methods of whole layers: none."
    )
    depth: Literal["aptp", "all", "blocks", "none"] = Field("aptp", description="Which whole layers may be removed.")
    include: str | list[str] | None = Field(
        None, description="Globs over module paths: prune only these; all if unset."
    )
    exclude: str | list[str] | None = Field(None, description="Globs over module paths: leave these as they are.")
    convention: Literal["exact", "conv_linear", "aptp"] = Field("exact", description="How MACs are counted.")
    resolution: int | tuple[int, int] | None = Field(
        None, description="Image side or (height, width) in pixels at which MACs count; unset: the model's own."
    )
    text_length: int | None = Field(None, ge=1, description="Text tokens at which MACs count; unset: the tokenizer's.")
    seed: int = Field(0, ge=0, lt=2**63, description="What all randomness of the method is keyed by.")

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
