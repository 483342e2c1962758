"""Encoded data and a stub of a pipeline for any small denoiser, for tests of methods that need data."""

import io
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from prunekit.core.registry import denoiser_of, part_of, process_of
from prunekit.data.encoded import EncodedData
from prunekit.data.images import CaptionedImages
from prunekit.denoisers.flow_matching import FlowMatching
from prunekit.runtime.randomness import generator


def encoded_for(model, num=8, side=8, text_length=7, seed=0):
    """Return random latents, text states and prompts of `num` captioned pictures, in the denoiser's shapes."""
    draw, denoiser = generator(seed, "small data"), denoiser_of(model)
    pictures = []
    for index in range(num):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (30 * index, 0, 0)).save(buffer, "png")
        pictures.append(buffer.getvalue())
    captions = [f"picture {index}" for index in range(num)]
    images = CaptionedImages(pictures, captions, captions, torch.arange(num), torch.zeros(num, dtype=torch.bool))
    added = {}
    if width := denoiser.pooled_width(model):
        pooled = torch.randn(num, width, generator=draw)
        added = {"pooled": pooled, "null_pooled": torch.zeros(width)}
    roles = denoiser.example_conditions(model, num, text_length, lambda role, shape: torch.ones(shape))
    if "sizes" in roles:
        added["time_ids"] = denoiser.family.sizes(64, 64)
    added["others"] = {role: (roles[role], roles[role][0]) for role in roles if role in ("mask", "guidance")}
    if type(model).__name__.endswith("ZImageTransformer2DModel"):  # its texts have different lengths
        mask = torch.arange(text_length) < 1 + torch.arange(num)[:, None] % text_length
        added["others"] = {"mask": (mask, mask[0])}
    return EncodedData(
        latents=torch.randn(num, denoiser.latent_channels(model), side, side, generator=draw),
        text=torch.randn(num, text_length, denoiser.text_width(model), generator=draw),
        null_text=torch.zeros(text_length, denoiser.text_width(model)),
        prompts=torch.nn.functional.normalize(torch.randn(num, 10, generator=draw), dim=1),
        images=images,
        **added,
    )


def stub(model, prediction_type="v_prediction"):
    """Return the parts of a pipeline that methods read."""
    part, scheduler = part_of(model), DDIMScheduler(prediction_type=prediction_type)
    if isinstance(process_of(model), FlowMatching):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return SimpleNamespace(**{part: model}, scheduler=scheduler, vae_scale_factor=8, tokenizer=None)
