"""The description of Flux2Transformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2FeedForward,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)
from torch import Tensor, nn

from prunekit.core.axes import Axis, Layer
from prunekit.core.call import Call
from prunekit.core.description import HIDDEN
from prunekit.core.emptied import Emptied, EmptiedLayer
from prunekit.core.family import Family
from prunekit.core.record import kept_groups
from prunekit.core.space import UnitGroup
from prunekit.core.transformer_layers import channel_groups
from prunekit.denoisers.joint import PackedCalls, TransformerDescription, pack, placed, positions

from .family import FLUX2

SINGLE = "single_transformer_blocks"
ENTRY = "to_qkv_mlp_proj"  # a parallel attention's first linear layer
EXIT = "to_out"  # a parallel attention's last linear layer


class HeadlessAttention(nn.Module):
    """The replacement of a parallel attention that lost all its heads: runs only its feed-forward."""

    def __init__(self, attention: Any):
        super().__init__()
        self.to_qkv_mlp_proj, self.mlp_act_fn = attention.to_qkv_mlp_proj, attention.mlp_act_fn
        self.to_out = attention.to_out
        self.inner_dim, self.mlp_hidden_dim = 0, attention.mlp_hidden_dim

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (B, n, C) to (B, n, C); positions are not used."""
        return self.to_out(self.mlp_act_fn(self.to_qkv_mlp_proj(hidden_states)))


class Flux2(PackedCalls, TransformerDescription):
    """FLUX.2: blocks of two streams, then blocks of one stream with attention and feed-forward side by side.

    No layer has a bias. All blocks of a kind share one modulation, which lies outside the blocks. A block of one stream
    takes text and image as one argument, and has two unit groups at the path of its attention. The attention's first
    linear layer returns queries, keys, values, and then the feed-forward's gates and values; its last linear layer
    reads the attention's channels and then the feed-forward's.
    """

    dense = Flux2Transformer2DModel
    family: ClassVar[Family] = FLUX2()
    lists = ("transformer_blocks", SINGLE)
    inputs = ("encoder_hidden_states", HIDDEN)
    arguments: ClassVar[Mapping[str, str]] = {**TransformerDescription.arguments, "guidance": "guidance"}
    layers_in_config = ("num_layers", "num_single_layers")
    classes: ClassVar = {"transformer_blocks": (Flux2TransformerBlock,), SINGLE: (Flux2SingleTransformerBlock,)}
    attentions = (Flux2Attention, Flux2ParallelSelfAttention)
    processors = (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)
    feedforwards = (Flux2FeedForward,)
    feedforward_inputs = ("linear_in",)
    feedforward_output = "linear_out"

    def stem(self, model: Any) -> Layer:
        """Return the stem: both ends, the embeddings of text, timestep and guidance, and the blocks' modulations."""
        streams = {"x_embedder": "image", "proj_out": "image", "context_embedder": "text"}
        return Layer("stem", "", "one", streams)

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """Return a block's layers: the block itself, then its attentions and feed-forwards."""
        if path.startswith(SINGLE):
            return [Layer("block", path, "joint"), *_parallel(model, f"{path}.attn", block.attn)]
        return self.joint_block(model, path, block)

    def passing(self, path: str) -> tuple[str, ...]:
        """Return the arguments that pass on if the block is removed: both streams, or the joint one."""
        return (HIDDEN,) if path.startswith(SINGLE) else self.inputs

    def after_cut(self, model: Any, layer: Layer, kept: Sequence[int]) -> None:
        """Update the widths that modules store; a parallel attention splits its channels by these widths."""
        module = model.get_submodule(layer.path)
        if layer.kind == "attention":
            super().after_cut(model, layer, kept)
        elif layer.path.startswith(SINGLE):
            module.mlp_hidden_dim = len(kept) * layer.units.channels
        if layer.path.startswith(SINGLE):
            _note_blocks(module)

    def empty(self, model: Any, layer: Layer) -> None:
        """Replace a layer that lost all its units; a parallel attention may lose heads, feed-forward, or both."""
        if not layer.path.startswith(SINGLE):
            super().empty(model, layer)
            return
        module = model.get_submodule(layer.path)
        if layer.kind == "attention":
            module = HeadlessAttention(module)
        else:
            module.mlp_hidden_dim = 0
        if module.inner_dim or module.mlp_hidden_dim:
            _note_blocks(module)
        else:
            module = EmptiedLayer(module, EXIT)
        model.set_submodule(layer.path, module)

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call for noisy latents (B, C, h, w), packed into tokens; the model takes timesteps t/1000."""
        tokens, rows, columns = pack(noisy)
        call = super().call(tokens, timesteps, conditions)
        image = positions(rows, columns, 4, noisy.device, torch.int64)
        text = image.new_zeros(conditions["text"].shape[1], 4)
        text[:, 3] += torch.arange(len(text), device=text.device)
        ids = {"img_ids": image, "txt_ids": text}
        return Call({**call, **ids}, shared=tuple(ids), **placed(rows, columns))

    def starting(self, call: Call) -> Tensor:
        """Return the noisy latents as the pipeline takes them: packed tokens on their grid, (B, 4·C, h/2, w/2)."""
        assert call.grid is not None, "a call of packed latents says their rows and columns"
        tokens: Tensor = call[self.latent]
        return tokens.transpose(1, 2).unflatten(2, call.grid)


def _parallel(model: Any, path: str, attention: Any) -> list[Layer]:
    """Return the layers of a parallel attention, its attention and its feed-forward, both at its path."""
    if isinstance(attention, Emptied):
        return []
    layers, width, inner = [], attention.inner_dim, attention.mlp_hidden_dim
    if width:
        group = UnitGroup("attention", path, attention.heads, width // attention.heads)
        axes = (Axis(ENTRY, "out", copies=3), Axis(EXIT, "in"))
        feeds = (f"{path}.norm_q", f"{path}.norm_k")
        layers.append(
            Layer("attention", path, "joint", group=group, axes=axes, products=("joint", "joint"), feeds=feeds)
        )
    if inner:
        groups = kept_groups(model, f"feedforward:{path}") or channel_groups(inner)
        group = UnitGroup("feedforward", path, groups, inner // groups)
        axes = (Axis(ENTRY, "out", 3 * width, copies=2), Axis(EXIT, "in", width))
        layers.append(Layer("feedforward", path, "joint", group=group, axes=axes))
    return layers


def _note_blocks(attention: Any) -> None:
    """Update the widths of the parts of a parallel attention's linear layers, which tensor parallelism reads."""
    width, inner = attention.inner_dim, attention.mlp_hidden_dim
    attention.to_qkv_mlp_proj._tp_packed_col_blocks = [width] * 3 + [inner] * 2
    attention.to_out._tp_packed_row_blocks = [width, inner]
