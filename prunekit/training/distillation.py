"""Distillation from the dense UNet: its output, and the output of each of its blocks (APTP, Eq. 27-29)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from prunekit.training.diffusion import per_sample_mse


@contextmanager
def block_outputs(unet: UNet2DConditionModel) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that every forward pass fills with the blocks' outputs, by path; hooks go on exit."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            outputs[path] = output[0] if isinstance(output, tuple) else output

        return hook

    blocks = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    if unet.mid_block is not None:
        blocks["mid_block"] = unet.mid_block
    blocks |= {f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)}
    handles = [block.register_forward_hook(keep(path)) for path, block in blocks.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def distillation_error(
    prediction: Tensor, teacher: Tensor, blocks: dict[str, Tensor], teacher_blocks: dict[str, Tensor]
) -> Tensor:
    """Return each sample's output error plus the sum of its blocks' errors, (B,) (Eq. 27-29).

    Blocks are compared where both models have them and their shapes agree; widths of the residual stream never change.
    """
    error = per_sample_mse(prediction, teacher)
    for path, reference in teacher_blocks.items():
        if path in blocks and blocks[path].shape == reference.shape:
            error = error + per_sample_mse(blocks[path], reference)
    return error
