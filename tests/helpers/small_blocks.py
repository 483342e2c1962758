"""The outputs of a UNet's blocks, for tests that compute a distillation error by hand."""

import torch
from diffusers import UNet2DConditionModel


def outputs_of(unet: UNet2DConditionModel, paths: list[str], **arguments) -> list[torch.Tensor]:
    """Return the output of a forward pass, then the outputs of the blocks at `paths`, in the order of the pass."""
    kept = []

    def keep(module, inputs, output):
        kept.append(output[0] if isinstance(output, tuple) else output)

    handles = [unet.get_submodule(path).register_forward_hook(keep) for path in paths]
    output = unet(**arguments).sample
    for handle in handles:
        handle.remove()
    return [output, *kept]


def block_paths(unet: UNet2DConditionModel, mid: bool = True) -> list[str]:
    """Return the paths of the down blocks, the mid block and the up blocks, in the order of the forward pass."""
    down, up = ([f"{name}.{i}" for i in range(len(getattr(unet, name)))] for name in ("down_blocks", "up_blocks"))
    return [*down, *(["mid_block"] if mid else []), *up]
