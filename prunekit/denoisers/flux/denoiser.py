"""The description of FluxTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from prunekit.core.axes import Axis, Layer
from prunekit.core.call import Call
from prunekit.core.emptied import Emptied, EmptiedOutput
from prunekit.core.family import Family
from prunekit.core.modulation import Modulation
from prunekit.core.record import kept_groups
from prunekit.core.space import UnitGroup
from prunekit.core.transformer_layers import NORMS, channel_groups, keep_heads
from prunekit.denoisers.joint import PackedCalls, TransformerDescription, pack, placed, positions

from .family import FLUX

SINGLE = "single_transformer_blocks"


class NoChannels(nn.Module):
    """The replacement of a branch that lost all its units: returns no channels to the concatenated branches."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (B, n, C) to (B, n, 0)."""
        return hidden_states[..., :0]


class Flux(PackedCalls, TransformerDescription):
    """FLUX.1: blocks of two streams, then blocks of one stream with attention and feed-forward side by side.

    A block of one stream holds two unit groups. Its output layer reads the attention's channels, then those of the
    feed-forward.
    """

    dense = FluxTransformer2DModel
    family: ClassVar[Family] = FLUX()
    lists = ("transformer_blocks", SINGLE)
    inputs = ("encoder_hidden_states", "hidden_states")
    arguments: ClassVar[Mapping[str, str]] = {
        **TransformerDescription.arguments,
        "guidance": "guidance",
    }
    layers_in_config = ("num_layers", "num_single_layers")
    modulation: ClassVar[Modulation | None] = Modulation(
        "time_text_embed", ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
    )
    classes: ClassVar = {"transformer_blocks": (FluxTransformerBlock,), SINGLE: (FluxSingleTransformerBlock,)}
    attentions = (FluxAttention,)
    processors = (FluxAttnProcessor,)

    def stem(self, model: Any) -> Layer:
        """Return the stem: both ends of the model, and the embeddings of text, timestep and guidance."""
        streams = {"x_embedder": "image", "proj_out": "image", "context_embedder": "text"}
        return Layer("stem", "", streams={**streams, "time_text_embed": "one", "norm_out": "one"})

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """Return a block's layers: the block with its modulation, then its attentions and feed-forwards."""
        if path.startswith(SINGLE):
            return [Layer("block", path, "one"), *_single(model, path, block)]
        return self.joint_block(model, path, block)

    def after_cut(self, model: Any, layer: Layer, kept: Sequence[int]) -> None:
        """Update the widths that modules store; a block of one stream stores them in several places."""
        if not layer.path.startswith(SINGLE):
            super().after_cut(model, layer, kept)
            return
        block = model.get_submodule(layer.path)
        if layer.kind == "attention":
            keep_heads(block.attn, len(kept), layer.units.channels)
        else:
            block.mlp_hidden_dim = len(kept) * layer.units.channels
        _note_blocks(block)

    def empty(self, model: Any, layer: Layer) -> None:
        """Replace a layer that lost all its units; a block of one stream without units keeps its output bias."""
        if not layer.path.startswith(SINGLE):
            super().empty(model, layer)
            return
        block = model.get_submodule(layer.path)
        if layer.kind == "attention":
            block.attn = NoChannels()
        else:
            block.proj_mlp, block.mlp_hidden_dim = NoChannels(), 0
        if isinstance(block.attn, NoChannels) and isinstance(block.proj_mlp, NoChannels):
            block.proj_out = EmptiedOutput(block.proj_out)
        else:
            _note_blocks(block)

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call for noisy latents (B, C, h, w), packed into tokens; the model takes timesteps t/1000."""
        tokens, rows, columns = pack(noisy)
        call = super().call(tokens, timesteps, conditions)
        places = positions(rows, columns, 3, noisy.device)
        text = places.new_zeros(conditions["text"].shape[1], 3)
        ids = {"img_ids": places, "txt_ids": text}
        return Call({**call, **ids}, shared=tuple(ids), **placed(rows, columns))


def _single(model: Any, path: str, block: Any) -> list[Layer]:
    """Return the layers of a block of one stream, all at its path; the output layer reads the attention first."""
    layers, width = [], 0
    if not isinstance(block.attn, NoChannels):
        width, heads = block.attn.to_q.out_features, block.attn.heads
        names = ("attn.to_q", "attn.to_k", "attn.to_v")
        layers.append(
            Layer(
                "attention",
                path,
                "joint",
                group=UnitGroup("attention", path, heads, width // heads),
                axes=(*(Axis(name, "out") for name in names), Axis("proj_out", "in")),
                products=("joint", "joint"),
                feeds=tuple(f"{path}.attn.{name}" for name in NORMS if getattr(block.attn, name, None) is not None),
            )
        )
    if not isinstance(block.proj_mlp, NoChannels):
        inner = block.proj_mlp.out_features
        groups = kept_groups(model, f"feedforward:{path}") or channel_groups(inner)
        axes = (Axis("proj_mlp", "out"), Axis("proj_out", "in", start=width))
        group = UnitGroup("feedforward", path, groups, inner // groups)
        layers.append(Layer("feedforward", path, "joint", group=group, axes=axes))
    return layers


def _note_blocks(block: Any) -> None:
    """Update the widths of the two parts of an output layer's inputs, which tensor parallelism reads."""
    if not isinstance(block.proj_out, Emptied):
        attention = 0 if isinstance(block.attn, NoChannels) else block.attn.to_q.out_features
        block.proj_out._tp_packed_row_blocks = [attention, block.mlp_hidden_dim]
