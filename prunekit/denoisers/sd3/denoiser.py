"""The description of SD3Transformer2DModel."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

from prunekit.core.axes import Layer
from prunekit.core.family import Family
from prunekit.core.modulation import Modulation
from prunekit.denoisers.joint import TransformerDescription

from .family import StableDiffusion3


class SD3(TransformerDescription):
    """SD 3 and 3.5: joint attention over two streams, and in 3.5 medium a second attention of the image alone.

    The last block reads the text stream and does not return it.
    """

    dense = SD3Transformer2DModel
    family: ClassVar[Family] = StableDiffusion3()
    inputs = ("encoder_hidden_states", "hidden_states")
    indices_in_config = ("dual_attention_layers",)
    classes: ClassVar = {"transformer_blocks": (JointTransformerBlock,)}
    tables: ClassVar[tuple[str, ...]] = ("pos_embed",)
    modulation: ClassVar[Modulation | None] = Modulation(
        "time_text_embed", ("norm1.linear", "norm1_context.linear", "norm_out.linear")
    )
    attentions = (Attention,)
    processors = (JointAttnProcessor2_0,)

    def stem(self, model: Any) -> Layer:
        """Return the stem: both ends of the model, and the embeddings of text and timestep."""
        streams = {"pos_embed": "image", "proj_out": "image", "context_embedder": "text"}
        return Layer("stem", "", streams={**streams, "time_text_embed": "one", "norm_out": "one"})

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """Return a block's layers: the block with its modulation, its attentions, and each stream's feed-forward."""
        return self.joint_block(model, path, block)
