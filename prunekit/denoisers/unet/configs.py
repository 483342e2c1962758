"""Building a UNet without weights from its config; configs that are not supported are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from prunekit.core.slicing import hollow
from prunekit.runtime.errors import UserError

from .pruned import PrunedUNet2DConditionModel
from .walk import check_supported

LAYERS = ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block")
MOST_LAYERS = 100  # largest number of layers in a block; SDXL has 10
SIZES = (  # config entries that hold an integer or nested lists of integers
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "cross_attention_dim", "norm_num_groups"),
    *("attention_head_dim", "num_attention_heads", "addition_time_embed_dim", "conv_in_kernel", "conv_out_kernel"),
    *("projection_class_embeddings_input_dim", *LAYERS),
)
MOST = 2**20  # largest value of every other size


def build(config: Mapping[str, Any], name: str | Path) -> UNet2DConditionModel:
    """Build a stock or pruned UNet on the meta device; raise UserError if it is not supported."""
    kind = PrunedUNet2DConditionModel if "pruning" in config else UNet2DConditionModel
    check_sizes(config, name)
    unet = hollow(kind, config, f"the UNet of {name}")
    check_supported(unet)
    return unet.eval()


def check_sizes(config: Mapping[str, Any], name: str | Path) -> None:
    """Raise UserError for sizes that are not positive integers, or so large that building would not end."""
    for key in SIZES:
        most = MOST_LAYERS if key in LAYERS else MOST
        for size in _leaves(config.get(key)):
            if type(size) is not int or not 1 <= size <= most:
                wrong = f"{key} has {size!r}, not an integer from 1 to {most}"
                raise UserError(f"the UNet of {name} is not supported: {wrong}")
    side = config.get("sample_size")
    if isinstance(side, list | tuple) and len(side) != 2:
        raise UserError(f"the UNet of {name} is not supported: sample_size={side}; give a side, or height and width")


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the items of nested lists, or a single value itself; yield nothing for None."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif value is not None:
        yield value
