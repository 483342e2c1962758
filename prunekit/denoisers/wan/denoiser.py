"""The description of WanTransformer3DModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor

from prunekit.core.axes import Layer
from prunekit.core.call import Call
from prunekit.core.family import Family
from prunekit.core.transformer_layers import attention_layer
from prunekit.denoisers.joint import TransformerDescription
from prunekit.runtime.errors import UserError

from .family import WanFamily

TABLES = frozenset({"scale_shift_table"})
OF_IMAGES = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")  # None unless the model animates a picture
DEFAULT_LATENT = (60, 104)  # 480 x 832 pixels


class Wan(TransformerDescription):
    """Wan 2.1, text to video, for pictures: self-attention, cross-attention to the text, a feed-forward.

    The model takes videos (B, C, F, h, w). A picture is a video of one frame. Everywhere in prunekit its latent is
    (B, C, h, w); the call adds the axis of frames and removes it from the prediction. So MACs are those of a picture.

    Queries and keys are normalized over all heads together. Under gates, the norm's statistic runs over the kept heads.
    The pruned model does the same: its norm has the same class and fewer channels.
    """

    dense = WanTransformer3DModel
    family: ClassVar[Family] = WanFamily()
    lists = ("blocks",)
    classes: ClassVar = {"blocks": (WanTransformerBlock,)}
    tables: ClassVar[tuple[str, ...]] = ("rope",)
    attentions = (WanAttention,)
    processors = (WanAttnProcessor,)

    def check(self, model: Any) -> None:
        """Raise UserError for a variant on which the laws have not been verified."""
        for name in OF_IMAGES:
            if (value := model.config.get(name)) is not None:
                raise UserError(
                    f"a WanTransformer3DModel with {name}={value} (image to video, whose cross-attentions have added "
                    "keys and values) is not supported: only text to video is"
                )
        frames, *_ = model.config.patch_size
        if frames != 1:
            raise UserError(
                f"a WanTransformer3DModel with patches of {frames} frames is not supported: a picture is one"
            )
        super().check(model)

    def stem(self, model: Any) -> Layer:
        """Return the stem: both ends of the model, and the embeddings of text and timestep."""
        streams = {"patch_embedding": "image", "proj_out": "image", "condition_embedder.text_embedder": "text"}
        return Layer("stem", "", "one", streams, tables=TABLES)

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """Return a block's layers: the block with its table of shifts and scales, two attentions, a feed-forward."""
        return [
            Layer("block", path, "image", tables=TABLES),
            attention_layer(f"{path}.attn1", block.attn1, "image", feeds=(f"{path}.norm1",), over_heads=True),
            attention_layer(f"{path}.attn2", block.attn2, "image", "text", feeds=(f"{path}.norm2",), over_heads=True),
            self.feedforward(model, f"{path}.ffn", block.ffn, "image", (f"{path}.norm3",)),
        ]

    def width(self, model: Any) -> int:
        """Return the number of channels of the hidden states that enter a block."""
        return int(model.config.num_attention_heads * model.config.attention_head_dim)

    def image_tokens(self, model: Any, latent: tuple[int, int]) -> int:
        """Return the number of tokens of a latent (h, w)."""
        _, rows, columns = model.config.patch_size
        return (latent[0] // rows) * (latent[1] // columns)

    def latent_size(self, model: Any) -> tuple[int, int]:
        """Return the pipeline's default latent size (h, w), because the config has none."""
        return DEFAULT_LATENT

    def text_width(self, model: Any) -> int:
        """Return the width of the text states."""
        return int(model.config.text_dim)

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call for noisy latents (B, C, h, w), which are passed as videos of one frame."""
        return Call(super().call(noisy.unsqueeze(2), timesteps, conditions), finish=_frame)

    def at(self, call: Call, noisy: Tensor, timesteps: Tensor) -> Call:
        """Return the call under the same conditions for other noisy latents (B, C, h, w) at other timesteps."""
        return super().at(call, noisy.unsqueeze(2), timesteps)

    def noisy(self, call: Call) -> Tensor:
        """Return the noisy latents of a call, (B, C, h, w)."""
        return _frame(super().noisy(call))


def _frame(video: Tensor) -> Tensor:
    """Return the only frame, (B, C, h, w), of videos (B, C, 1, h, w)."""
    return video.squeeze(2)
