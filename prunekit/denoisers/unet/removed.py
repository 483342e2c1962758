"""The modules in a pruned UNet that replace a layer that lost all its units, or that was removed as a whole."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from prunekit.core.emptied import Emptied


class EmptiedResnet(Emptied):
    """A ResBlock without a hidden channel: the shortcut plus `conv2`'s bias."""

    bias: nn.Parameter  # never None: a ResBlock's convolutions have biases

    def __init__(self, resnet: ResnetBlock2D):
        self.outputs = {"bias": "conv2"}
        super().__init__(resnet)
        self.in_channels = resnet.in_channels
        self.out_channels = resnet.out_channels
        self.output_scale_factor = resnet.output_scale_factor
        self.conv_shortcut = resnet.conv_shortcut

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h, w); the timestep embedding is not used."""
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + self.bias[:, None, None]) / self.output_scale_factor


class BypassedResnet(nn.Module):
    """The replacement of a removed ResBlock: returns its input, in up blocks without the joined skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, channels + skip, h, w) to (B, channels, h, w)."""
        return input_tensor[:, : self.channels]


class BypassedTransformer(nn.Module):
    """The replacement of a removed Transformer layer: returns its input."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        """Return (B, C, h, w) in a tuple, as a Transformer layer does with return_dict=False."""
        return (hidden_states,)


class BypassedModule(nn.Module):
    """The replacement of a removed transformer block, downsampler or upsampler: returns its input."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the first argument."""
        return hidden_states


BYPASSED = (BypassedResnet, BypassedTransformer, BypassedModule)


def bypass(unet: nn.Module, path: str, channels: int) -> None:
    """Replace a layer, or all layers of a block, by modules that pass on the hidden state's `channels` channels."""
    parts = path.split(".")
    if parts[-2:-1] == ["resnets"]:
        unet.set_submodule(path, BypassedResnet(channels))
    elif parts[-2:-1] == ["attentions"]:
        unet.set_submodule(path, BypassedTransformer())
    elif parts[-2:-1] in (["transformer_blocks"], ["downsamplers"], ["upsamplers"]):
        unet.set_submodule(path, BypassedModule())
    else:  # a whole down, mid or up block
        block = unet.get_submodule(path)
        for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
            for index in range(len(getattr(block, name, None) or ())):
                bypass(unet, f"{path}.{name}.{index}", channels)
