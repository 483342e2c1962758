"""The parts that descriptions of diffusers' transformers share: attentions, feed-forwards, cuts and packed calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from prunekit.core.axes import Layer
from prunekit.core.call import Call, Fill, NamedCalls
from prunekit.core.description import Description
from prunekit.core.emptied import EmptiedLayer
from prunekit.core.record import kept_groups
from prunekit.core.transformer_layers import (
    EmptiedAttention,
    EmptiedJointAttention,
    attention_layer,
    check_plain,
    feedforward_layer,
    keep_heads,
)
from prunekit.runtime.errors import UserError

PROJECTIONS = ("to_q", "to_k", "to_v", "to_qkv_mlp_proj")  # an attention's input projections; a class has some of them


class TransformerDescription(Description):
    """The description of a transformer whose blocks hold diffusers' attentions and feed-forwards.

    classes: supported classes of blocks, by list of blocks.
    attentions: attention classes on which the laws have been verified.
    processors: supported attention processors; they read no width that a cut changes.
    feedforwards: feed-forward classes. feedforward_inputs, feedforward_output: paths of their first and last linear
        layers.
    """

    classes: ClassVar[Mapping[str, tuple[type[nn.Module], ...]]]
    attentions: ClassVar[tuple[type[nn.Module], ...]]
    processors: ClassVar[tuple[type, ...]]
    feedforwards: ClassVar[tuple[type[nn.Module], ...]] = (FeedForward,)
    feedforward_inputs: ClassVar[tuple[str, ...]] = ("net.0.proj",)
    feedforward_output: ClassVar[str] = "net.2"

    def check(self, model: Any) -> None:
        """Raise UserError, with the path, for a part on which the laws have not been verified."""
        for path, block in self.blocks(model).items():
            allowed = self.classes[path.partition(".")[0]]
            if type(block) not in allowed:
                raise UserError(f"{path} is a {type(block).__name__}, which is not supported")
            for name, module in block.named_modules():
                self._check_module(f"{path}.{name}", module)

    def _check_module(self, path: str, module: nn.Module) -> None:
        if isinstance(module, self.attentions):
            processor: Any = module.processor
            if type(processor) not in self.processors:
                raise UserError(
                    f"{path} has the processor {type(processor).__name__}, which is not supported: remove adapters "
                    "and set the default processors first"
                )
            if getattr(module, "fused_projections", False):
                raise UserError("fused attention projections are not supported; call unfuse_qkv_projections() first")
            names = tuple(name for name in PROJECTIONS if hasattr(module, name))
        elif isinstance(module, self.feedforwards):
            names = (*self.feedforward_inputs, self.feedforward_output)
        else:
            return
        check_plain(path, map(module.get_submodule, names), (nn.Linear,))

    def joint_block(
        self, model: Any, path: str, block: Any, image: str = "ff", text: str = "ff_context"
    ) -> list[Layer]:
        """Describe a block of two streams with joint attention: its modulation, its attentions, its feed-forwards.

        image, text: names of the image's and the text's feed-forward; in a last block, the text's may be None.
        """
        layers = [Layer("block", path, "one")]
        layers.append(attention_layer(f"{path}.attn", block.attn, "image", "joint", added="text"))
        if getattr(block, "attn2", None) is not None:
            layers.append(attention_layer(f"{path}.attn2", block.attn2, "image"))
        for name, stream in ((image, "image"), (text, "text")):
            if (part := getattr(block, name)) is not None:
                layers.append(self.feedforward(model, f"{path}.{name}", part, stream))
        return layers

    def feedforward(self, model: Any, path: str, module: Any, stream: str, feeds: Sequence[str] = ()) -> Layer:
        """Describe a feed-forward, dense or already cut; see `feedforward_layer`."""
        groups = kept_groups(model, f"feedforward:{path}")
        return feedforward_layer(path, module, stream, groups, feeds, self.feedforward_inputs, self.feedforward_output)

    def after_cut(self, model: Any, layer: Layer, kept: Sequence[int]) -> None:
        """Update an attention's number of heads and its widths."""
        module = model.get_submodule(layer.path)
        if isinstance(module, self.attentions):
            keep_heads(module, len(kept), layer.units.channels)

    def empty(self, model: Any, layer: Layer) -> None:
        """Replace a layer that lost all its units by a module that returns only its output biases."""
        module = model.get_submodule(layer.path)
        if isinstance(module, self.feedforwards):
            model.set_submodule(layer.path, EmptiedLayer(module, self.feedforward_output))
            return
        joint = getattr(module, "add_q_proj", None) is not None
        model.set_submodule(layer.path, EmptiedJointAttention(module) if joint else EmptiedAttention(module))

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call for noisy latents (B, C, h, w), with one timestep for each sample."""
        return super().call(noisy, timesteps.expand(len(noisy)), conditions)

    def text_width(self, model: Any) -> int:
        """Return the width of the text states."""
        return int(model.config.joint_attention_dim)

    def pooled_width(self, model: Any) -> int:
        """Return the width of the pooled text embedding; 0 where the model takes none."""
        return int(model.config.get("pooled_projection_dim", 0))

    def lengths(self, model: Any, latent: tuple[int, int], text_length: int) -> dict[str, int]:
        """Return the number of positions by stream: "image", "text", "joint" (both), and "one" (1 per sample)."""
        image = self.image_tokens(model, latent)
        return {"image": image, "text": text_length, "joint": image + text_length, "one": 1}

    def image_tokens(self, model: Any, latent: tuple[int, int]) -> int:
        """Return the number of tokens of a latent (h, w)."""
        patch = model.config.patch_size
        return (latent[0] // patch) * (latent[1] // patch)


PACKED = 2  # latent positions along each side of a token
TIMESTEP_UNIT = 1000  # diffusers' pipelines divide timesteps by this number, whatever the scheduler's number of steps


class PackedCalls(NamedCalls):
    """The calls of a model whose pipeline packs 2 x 2 positions of the latent into one token."""

    def noisy(self, call: Call) -> Tensor:
        """Return the noisy latents of a call, (B, C, h, w)."""
        return unpack(super().noisy(call), *_grid(call))

    def at(self, call: Call, noisy: Tensor, timesteps: Tensor) -> Call:
        """Return the call under the same conditions for other noisy latents at other timesteps."""
        tokens, *_ = pack(noisy)
        return super().at(call, tokens, timesteps.expand(len(noisy)))

    def taken(self, timesteps: Tensor) -> Tensor:
        """Return timesteps as the model takes them: from 0 to 1, not from 0 to 1000."""
        return timesteps / TIMESTEP_UNIT

    def latent_channels(self, model: Any) -> int:
        """Return the number of channels of the latents."""
        return int(model.config.in_channels) // PACKED**2

    def latent_size(self, model: Any) -> tuple[int, int]:
        """Return the pipelines' default latent size (h, w), because the config has none."""
        return (128, 128)

    def image_tokens(self, model: Any, latent: tuple[int, int]) -> int:
        """Return the number of tokens of a latent (h, w)."""
        return (latent[0] // PACKED) * (latent[1] // PACKED)

    def example_conditions(self, model: Any, batch: int, text_length: int, fill: Fill) -> dict[str, Tensor]:
        """Return the conditions of an example call, by role; with a guidance scale where the model takes one."""
        conditions = super().example_conditions(model, batch, text_length, fill)
        if "guidance" in self.arguments and model.config.guidance_embeds:
            conditions["guidance"] = fill("guidance", (batch,))
        return conditions


def pack(latents: Tensor) -> tuple[Tensor, int, int]:
    """Return latents (B, C, h, w) as tokens (B, h/2·w/2, 4·C), and the numbers of token rows and columns."""
    batch, channels, height, width = latents.shape
    rows, columns = height // PACKED, width // PACKED
    tokens = latents.reshape(batch, channels, rows, PACKED, columns, PACKED).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, rows * columns, channels * PACKED**2), rows, columns


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Return tokens (B, rows·columns, 4·C) as latents (B, C, h, w); the inverse of `pack`."""
    batch, _, channels = tokens.shape
    parts = tokens.reshape(batch, rows, columns, channels // PACKED**2, PACKED, PACKED).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(batch, channels // PACKED**2, rows * PACKED, columns * PACKED)


def positions(rows: int, columns: int, axes: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the tokens' positions, (rows·columns, axes): axis 1 holds the row, axis 2 the column, others 0."""
    places = torch.zeros(rows, columns, axes, device=device, dtype=dtype)
    places[..., 1] += torch.arange(rows, device=device)[:, None]
    places[..., 2] += torch.arange(columns, device=device)
    return places.flatten(0, 1)


def placed(rows: int, columns: int) -> dict[str, Any]:
    """Return the `grid` and the `finish` that a `Call` with packed latents needs."""
    return {"grid": (rows, columns), "finish": partial(unpack, rows=rows, columns=columns)}


def _grid(call: Call) -> tuple[int, int]:
    assert call.grid is not None, "a call with packed latents needs their rows and columns"
    return call.grid
