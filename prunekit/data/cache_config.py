"""What of the frozen parts' output a run keeps on disk."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _unquoted_off(value: Any) -> Any:
    """YAML reads an unquoted `off` as false."""
    return "off" if value is False else value


class CacheConfig(BaseModel):
    """How latents, text states and prompt embeddings are kept; all of them are made once and read by every stage."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    directory: str | None = Field(
        None, description="where encoded data lies; runs that share it share the work; unset: the run's own cache"
    )
    latents: Annotated[Literal["means", "moments", "off"], BeforeValidator(_unquoted_off)] = Field(
        "means",
        description="what of a picture is kept: the posterior's mean; mean and deviation, sampled anew each time it is "
        "seen; off: nothing, pictures are encoded at every step",
    )
    text: bool = Field(True, description="keep the text encoder's states; false: captions are encoded at every step")
    precision: Literal["float32", "float16"] = Field("float32", description="what is stored")
    shard_size: int = Field(4096, gt=0, description="pictures, or captions, of one file")


def cache_bytes(
    images: int,
    captions: int,
    latent_shape: tuple[int, ...],
    text_shape: tuple[int, ...],
    prompt_width: int,
    config: CacheConfig,
    pooled_width: int = 0,
) -> dict[str, int]:
    """Return the bytes that the cache of a data set takes on disk, by part: latents, text, prompts, pooled.

    latent_shape: (C, h, w). text_shape: (T, E) of one caption. prompt_width: Z. pooled_width: of SDXL's pooled text
    embeddings, else 0. A part that `config` does not keep is 0; files' headers (about 100 bytes each) are left out.
    """
    size = {"float32": 4, "float16": 2}[config.precision]
    values = {"off": 0, "means": 1, "moments": 2}[config.latents] * math.prod(latent_shape)
    kept = captions if config.text else 0
    return {
        "latents": images * values * size,
        "text": kept * math.prod(text_shape) * size,
        "prompts": captions * prompt_width * size,
        "pooled": kept * pooled_width * size,
    }
