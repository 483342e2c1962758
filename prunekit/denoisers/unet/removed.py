"""What stands in a pruned UNet where a layer lost all its units, or is gone as a whole."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from prunekit.core.emptied import Emptied


class EmptiedResnet(Emptied):
    """A ResBlock without a hidden channel: the shortcut plus `conv2`'s bias."""

    bias: nn.Parameter  # a ResBlock's convolutions have one

    def __init__(self, resnet: ResnetBlock2D):
        self.outputs = {"bias": "conv2"}
        super().__init__(resnet)
        self.in_channels = resnet.in_channels
        self.out_channels = resnet.out_channels
        self.output_scale_factor = resnet.output_scale_factor
        self.conv_shortcut = resnet.conv_shortcut

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w); the time embedding has nothing left to act on."""
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + self.bias[:, None, None]) / self.output_scale_factor


class BypassedResnet(nn.Module):
    """In place of a removed ResBlock: the hidden state that entered, without the skip joined to it in up blocks."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """(B, channels + skip, h, w) -> (B, channels, h, w)."""
        return input_tensor[:, : self.channels]


class BypassedTransformer(nn.Module):
    """In place of a removed Transformer layer."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        """(B, C, h, w) -> ((B, C, h, w),), as a Transformer layer called with return_dict=False."""
        return (hidden_states,)


class BypassedModule(nn.Module):
    """In place of a removed transformer block, downsampler or upsampler."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Its first argument."""
        return hidden_states


BYPASSED = (BypassedResnet, BypassedTransformer, BypassedModule)


def bypass(unet: nn.Module, path: str, channels: int) -> None:
    """Replace a layer, or all layers of a block, by modules that pass the hidden state of `channels` on."""
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
