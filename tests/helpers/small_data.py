"""Encoded data and a pipeline's outline for any small UNet: what methods that need data are tested with."""

import io
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler
from PIL import Image

from prunekit.data.encoded import EncodedData
from prunekit.data.images import CaptionedImages
from prunekit.runtime.randomness import generator


def encoded_for(unet, num=8, side=8, text_length=7, seed=0):
    """Random latents, text states and prompts of `num` captioned pictures, as the UNet takes them."""
    draw, config = generator(seed, "small data"), unet.config
    pictures = []
    for index in range(num):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (30 * index, 0, 0)).save(buffer, "png")
        pictures.append(buffer.getvalue())
    captions = [f"picture {index}" for index in range(num)]
    images = CaptionedImages(pictures, captions, captions, torch.arange(num), torch.zeros(num, dtype=torch.bool))
    added = {}
    if config.get("addition_embed_type") == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        time_ids = torch.tensor([64.0, 64, 0, 0, 64, 64])
        pooled = torch.randn(num, width, generator=draw)
        added = {"pooled": pooled, "null_pooled": torch.zeros(width), "time_ids": time_ids}
    return EncodedData(
        latents=torch.randn(num, config.in_channels, side, side, generator=draw),
        text=torch.randn(num, text_length, config.cross_attention_dim, generator=draw),
        null_text=torch.zeros(text_length, config.cross_attention_dim),
        prompts=torch.nn.functional.normalize(torch.randn(num, 10, generator=draw), dim=1),
        images=images,
        **added,
    )


def stub(unet, prediction_type="v_prediction"):
    """What methods read of a pipeline."""
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    return SimpleNamespace(unet=unet, scheduler=scheduler, vae_scale_factor=8, tokenizer=None)
