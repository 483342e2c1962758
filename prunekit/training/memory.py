"""How a training holds its UNets: activations recomputed or kept, and the layout of convolutions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel

from prunekit.training.trainer import TrainerConfig


@contextmanager
def held(config: TrainerConfig, trained: UNet2DConditionModel, *others: UNet2DConditionModel) -> Iterator[None]:
    """Hold UNets as a training's settings say; on exit they are as before.

    trained: the one that gradients go through, to its weights or to the gates on it; it alone recomputes activations.
    """
    unets = (trained, *others)
    if config.channels_last:
        for unet in unets:
            unet.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        trained.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if config.gradient_checkpointing:
            trained.disable_gradient_checkpointing()
        if config.channels_last:
            for unet in unets:
                unet.to(memory_format=torch.contiguous_format)
