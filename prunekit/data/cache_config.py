"""What of the frozen parts' output a run keeps on disk."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CacheConfig(BaseModel):
    """How latents, text states and prompt embeddings are kept; all of them are made once and read by every stage."""

    model_config = ConfigDict(extra="forbid")

    directory: str | None = Field(
        None, description="where encoded data lies; runs that share it share the work; unset: the run's own cache"
    )
    latents: Literal["means", "moments", "off"] = Field(
        "means",
        description="what of a picture is kept: the posterior's mean; mean and deviation, sampled anew each time it is "
        "seen; off: nothing, pictures are encoded at every step",
    )
    text: bool = Field(True, description="keep the text encoder's states; false: captions are encoded at every step")
    precision: Literal["float32", "float16"] = Field("float32", description="what is stored")
    shard_size: int = Field(4096, gt=0, description="pictures, or captions, of one file")
