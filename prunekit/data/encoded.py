"""The frozen parts run once: latents, text states and prompt embeddings of a data set, cached on disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor

from prunekit.data.fingerprint import Fingerprint
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
    pooled: Tensor | None = None  # (P, E2): pooled text embeddings, where the UNet is conditioned on them (SDXL)
    null_pooled: Tensor | None = None  # (E2,)
    time_ids: Tensor | None = None  # (6,): original size, crop and target size, where the UNet is conditioned on them

    @property
    def image_index(self) -> Tensor:
        """The image of each pair, (P,)."""
        return self.images.image_index

    def training_pairs(self) -> Tensor:
        """The pairs that training may use, (P_train,)."""
        return self.images.training_pairs()

    def conditions(
        self, pairs: Tensor, device: torch.device | str = "cpu", dropped: Tensor | None = None
    ) -> dict[str, Any]:
        """Return the UNet's keyword arguments that condition it on the captions of `pairs` (n,).

        dropped: (n,) bool, which samples get the empty caption instead.
        """
        dropped = torch.zeros(len(pairs), dtype=torch.bool) if dropped is None else dropped

        def chosen(values: Tensor, null: Tensor) -> Tensor:
            mask = dropped.view(-1, *[1] * null.dim())
            return torch.where(mask, null, values[pairs]).to(device)

        conditions: dict[str, Any] = {"encoder_hidden_states": chosen(self.text, self.null_text)}
        if self.pooled is not None:
            assert self.null_pooled is not None and self.time_ids is not None
            time_ids = self.time_ids.expand(len(pairs), -1).to(device)
            conditions["added_cond_kwargs"] = {
                "text_embeds": chosen(self.pooled, self.null_pooled),
                "time_ids": time_ids,
            }
        return conditions


def encode(
    pipeline: DiffusionPipeline,
    images: CaptionedImages,
    prompt_encoder: Any,
    resolution: int,
    cache: Path | None = None,
) -> EncodedData:
    """Run the frozen encoders over a data set, or read what an earlier call with the same input left in `cache`.

    prompt_encoder: has `.encode(list of str) -> (n, Z)`. resolution: pixels of a side. Pictures that cannot be decoded
    are left out with their captions, so that `images` of the result may be fewer; DataError where that is more than
    the images' tolerance allows.
    """
    key = _fingerprint(pipeline, images, prompt_encoder, resolution) if cache else ""
    if cache is not None and cache.is_file():
        with safe_open(cache, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") == key:
                kept = images.without({int(i): reason for i, reason in json.loads(metadata.get("bad", "{}")).items()})
                return EncodedData(**{name: file.get_tensor(name) for name in file.keys()}, images=kept)  # noqa: SIM118
    bad: dict[int, str] = {}
    data = _run(pipeline, images, prompt_encoder, resolution, bad)
    if cache is not None:
        tensors = {name: value for name, value in vars(data).items() if isinstance(value, Tensor)}
        save_tensors(cache, tensors, {"key": key, **({"bad": json.dumps(bad)} if bad else {})})
    return data


@torch.no_grad()
def _run(
    pipeline: DiffusionPipeline, images: CaptionedImages, prompt_encoder: Any, resolution: int, bad: dict[int, str]
) -> EncodedData:
    vae, device = pipeline.vae, pipeline.vae.device

    def states(texts: list[str]) -> tuple[Tensor, Tensor | None]:
        options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        encoded = pipeline.encode_prompt(texts, **options)  # SDXL: states, none, pooled, none
        return encoded[0].float().cpu(), encoded[2].float().cpu() if len(encoded) > 2 else None

    latents, text, pooled = [], [], []
    with Progress("encode", images.num_images + images.num_pairs) as progress:
        for start in range(0, images.num_images, BATCH):
            stop = min(start + BATCH, images.num_images)
            decoded = images.readable_pixels(range(start, stop), resolution, bad)
            if decoded:
                pixels = torch.stack(decoded).to(device, vae.dtype) / 127.5 - 1
                latents.append((vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor).float().cpu())
            progress.update(stop)
        num_read = images.num_images
        images = images.without(bad)
        for start in range(0, images.num_pairs, BATCH):
            states_of, pooled_of = states(images.captions[start : start + BATCH])
            text.append(states_of)
            pooled += [] if pooled_of is None else [pooled_of]
            progress.update(num_read + start + len(text[-1]))
    prompts = torch.as_tensor(prompt_encoder.encode(images.captions)).float()
    null_text, null_pooled = states([""])
    added: dict[str, Tensor] = {}
    if null_pooled is not None:
        if pipeline.config.get("force_zeros_for_empty_prompt"):  # as the pipeline guides away from no caption
            null_text, null_pooled = torch.zeros_like(null_text), torch.zeros_like(null_pooled)
        sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
        added = {"pooled": torch.cat(pooled), "null_pooled": null_pooled[0], "time_ids": sizes}
    return EncodedData(torch.cat(latents), torch.cat(text), null_text[0], prompts, images, **added)


def _fingerprint(pipeline: DiffusionPipeline, images: CaptionedImages, prompt_encoder: Any, resolution: int) -> str:
    fingerprint = Fingerprint(resolution).add_encoders(pipeline)
    fingerprint.add_pictures(images.encoded).add_texts(images.captions)
    return fingerprint.add_tensor(torch.as_tensor(prompt_encoder.encode(images.captions[:16]))).key()
