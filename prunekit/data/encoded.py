"""The frozen parts run once: latents, text states and prompt embeddings of a data set, cached on disk."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor

from prunekit.data.images import CaptionedImages
from prunekit.training.checkpoint import save_tensors
from prunekit.training.progress import Progress

BATCH = 64


@dataclass(frozen=True)
class EncodedData:
    """What training on a frozen autoencoder, text encoder and prompt encoder needs, for n images and P pairs."""

    latents: Tensor  # (n, C, h, w) float32: the posterior's mean, scaled
    text: Tensor  # (P, T, E) float32: the text encoder's states
    null_text: Tensor  # (T, E): the empty caption's
    prompts: Tensor  # (P, Z) float32: the prompt encoder's embeddings
    images: CaptionedImages

    @property
    def image_index(self) -> Tensor:
        """The image of each pair, (P,)."""
        return self.images.image_index

    def training_pairs(self) -> Tensor:
        """The pairs that training may use, (P_train,)."""
        return self.images.training_pairs()


def encode(
    pipeline: DiffusionPipeline,
    images: CaptionedImages,
    prompt_encoder: Any,
    resolution: int,
    cache: Path | None = None,
) -> EncodedData:
    """Run the frozen encoders over a data set, or read what an earlier call with the same input left in `cache`.

    prompt_encoder: has `.encode(list of str) -> (n, Z)`. resolution: pixels of a side.
    """
    names = ("latents", "text", "null_text", "prompts")
    key = _fingerprint(pipeline, images, prompt_encoder, resolution) if cache else ""
    if cache is not None and cache.is_file():
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return EncodedData(*(file.get_tensor(name) for name in names), images)
    data = _run(pipeline, images, prompt_encoder, resolution)
    if cache is not None:
        save_tensors(cache, {name: getattr(data, name) for name in names}, {"key": key})
    return data


@torch.no_grad()
def _run(pipeline: DiffusionPipeline, images: CaptionedImages, prompt_encoder: Any, resolution: int) -> EncodedData:
    vae, device = pipeline.vae, pipeline.vae.device

    def states(texts: list[str]) -> Tensor:
        encoded = pipeline.encode_prompt(texts, device, 1, do_classifier_free_guidance=False)[0]
        return encoded.float().cpu()

    latents, text = [], []
    with Progress("encode", images.num_images + images.num_pairs) as progress:
        for start in range(0, images.num_images, BATCH):
            stop = min(start + BATCH, images.num_images)
            pixels = images.pixels(range(start, stop), resolution).to(device, vae.dtype) / 127.5 - 1
            latents.append((vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor).float().cpu())
            progress.update(stop)
        for start in range(0, images.num_pairs, BATCH):
            text.append(states(images.captions[start : start + BATCH]))
            progress.update(images.num_images + start + len(text[-1]))
    prompts = torch.as_tensor(prompt_encoder.encode(images.captions)).float()
    return EncodedData(torch.cat(latents), torch.cat(text), states([""])[0], prompts, images)


def _fingerprint(pipeline: DiffusionPipeline, images: CaptionedImages, prompt_encoder: Any, resolution: int) -> str:
    digest = hashlib.blake2b(repr(resolution).encode(), digest_size=16)
    for module in (pipeline.vae, pipeline.text_encoder):
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().numpy().tobytes())
    for encoded in images.encoded:
        digest.update(hashlib.blake2b(encoded, digest_size=16).digest())
    digest.update("\0".join(images.captions).encode())
    digest.update(torch.as_tensor(prompt_encoder.encode(images.captions[:16])).numpy().tobytes())
    return digest.hexdigest()
