"""Deltas: each expert adds low-rank changes to the weights that all experts share, and changes to biases and norms.

All experts train one backbone, so every step trains the shared weights. The deltas of an expert hold only what is
specific to it. They are added to the weights of its slice, so they cost nothing at inference. Deltas start at zero,
where an expert equals the backbone's slice. Sources: low-rank changes as in LoRA (arXiv 2106.09685); experts that share
nearly all weights as in Remix-DiT (arXiv 2412.05628).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor, nn

from prunekit.core.emptied import names_in_files
from prunekit.core.slicing import DELTAS, DOWN, SHIFT, UP
from prunekit.runtime.randomness import generator


class DeltaConfig(BaseModel):
    """Difference of an expert's weights to the shared weights."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    rank: int = Field(
        8,
        ge=0,
        le=4096,
        description="Rank of the change of each matrix and kernel; 0: matrices and kernels do not change.",
    )
    scale: float = Field(
        2.0,
        gt=0,
        description="Factor of a low-rank change; a larger factor lets it learn faster than the shared weights.",
    )


class Deltas(nn.Module):
    """Changes of one expert's parameters: W + scale · up · down for a matrix or kernel, w + shift for a vector."""

    def __init__(self, model: nn.Module, config: DeltaConfig, seed: int, index: int, device: torch.device):
        """Create changes of zero for the parameters of a model, which may be on the meta device.

        seed, index (of the expert): key the random values of `down`.
        """
        super().__init__()
        self.scale, self.low_rank, self.vectors = config.scale, list[str](), list[str]()
        self.down, self.up, self.shift = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        draws = generator(seed, "deltas", index)
        self.in_files = names_in_files(model)
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                self.vectors.append(name)
                self.shift.append(nn.Parameter(torch.zeros(parameter.shape, device=device)))
            elif config.rank:
                inputs = parameter[0].numel()
                self.low_rank.append(name)
                down = torch.randn(config.rank, inputs, generator=draws) / inputs**0.5
                self.down.append(nn.Parameter(down.to(device)))
                self.up.append(nn.Parameter(torch.zeros(len(parameter), config.rank, device=device)))

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and its change, flattened after the first axis; gradients reach the factors."""
        for name, down, up in zip(self.low_rank, self.down, self.up, strict=True):
            yield name, self.scale * (up @ down)
        yield from zip(self.vectors, self.shift, strict=True)

    def save(self, folder: Path) -> None:
        """Write the changes into an expert's folder, under the names that its tensors have in files."""
        content: dict[str, Tensor] = {}
        for name, down, up in zip(self.low_rank, self.down, self.up, strict=True):
            name = self.in_files.get(name, name)
            content[name + DOWN], content[name + UP] = self.scale * down.detach(), up.detach()
        for name, shift in zip(self.vectors, self.shift, strict=True):
            content[self.in_files.get(name, name) + SHIFT] = shift.detach()
        save_file({name: tensor.contiguous().cpu() for name, tensor in content.items()}, folder / DELTAS)
