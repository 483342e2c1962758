"""Settings of the cache: which outputs of the frozen encoders a run stores on disk."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _unquoted_off(value: Any) -> Any:
    """Return "off" for False, because YAML reads an unquoted `off` as false."""
    return "off" if value is False else value


class CacheConfig(BaseModel):
    """Storage of latents, text states and prompt embeddings, which are computed once and read by every stage."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    directory: str | None = Field(
        None,
        description="Directory of encoded data; runs with the same directory share the work. Unset: "
        "`cache` in the run's directory.",
    )
    latents: Annotated[Literal["means", "moments", "off"], BeforeValidator(_unquoted_off)] = Field(
        "means",
        description="Stored form of a picture. means: the mean of the posterior; moments: mean and standard deviation, "
        "sampled again at every step; off: nothing, pictures are encoded at every step.",
    )
    text: bool = Field(True, description="Store the text encoder's states; false: captions are encoded at every step.")
    precision: Literal["float32", "float16"] = Field("float32", description="Dtype of stored latents and states.")
    shard_size: int = Field(4096, gt=0, description="Number of pictures or captions per file.")


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

    latent_shape: (C, h, w). text_shape: (T, E) of one caption. prompt_width: Z. pooled_width: width of SDXL's pooled
    text embeddings, else 0. A part that `config` does not store is 0. Headers (about 100 bytes per file) are left out.
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
