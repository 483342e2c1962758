"""A pipeline around a small UNet, without a tokenizer: prompts are given as embeddings."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler


def pipeline_of(cls, unet, scheduler=None):
    """Return a Stable Diffusion pipeline of class `cls`, with a small autoencoder with random weights."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4).eval()
    pipeline = cls(
        vae=autoencoder,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler or DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
