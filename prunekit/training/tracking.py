"""Where a run's figures go beside its log: TensorBoard, Weights & Biases, trackio, through accelerate."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrackingConfig(BaseModel):
    """Which trackers get a run's figures; `log.jsonl` always has them."""

    model_config = ConfigDict(extra="forbid")

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="each needs its package; the extra `tracking` has them"
    )
    project: str = Field("prunekit", description="the trackers' project")
