"""Encoded data: latents, text states and prompt embeddings of a data set, computed once and cached on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from prunekit.data.cache_config import CacheConfig
from prunekit.data.cache_parts import PartMaker
from prunekit.data.encoders import CaptionStates, FrozenEncoders, LiveLatents, LiveText
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.images import CaptionedImages
from prunekit.data.rows import Rows
from prunekit.runtime.tensors import to_device


@dataclass(frozen=True)
class EncodedData:
    """The frozen encoders' output for n images and P (image, caption) pairs, which training reads.

    A field with one row per image or per pair is a tensor, or Rows that are read or computed on demand.
    """

    latents: Tensor | Rows  # (n, C, h, w) float32: the posterior's mean, scaled
    text: Tensor | Rows  # (P, T, E) float32: the text encoder's states
    null_text: Tensor  # (T, E): states of the empty caption
    prompts: Tensor | Rows  # (P, Z) float32: the prompt encoder's embeddings
    images: CaptionedImages
    pooled: Tensor | Rows | None = None  # (P, E2): pooled text embeddings, where they condition the denoiser (SDXL)
    null_pooled: Tensor | None = None  # (E2,)
    time_ids: Tensor | None = None  # (6,): original size, crop and target size, where they condition the denoiser
    # further conditions by role, such as "mask": (captions' values (P, …), the empty caption's value)
    others: Mapping[str, tuple[Tensor | Rows, Tensor]] = field(default_factory=dict)
    deviations: Tensor | Rows | None = None  # (n, C, h, w): the posterior's standard deviation, if latents are sampled
    key: str = field(default="", compare=False)  # digest of everything that the data depends on; empty: unknown

    @property
    def image_index(self) -> Tensor:
        """The image of each pair, (P,)."""
        return self.images.image_index

    def draw_latents(self, pairs: Tensor, noise: Tensor | None) -> Tensor:
        """Return the latents (k, C, h, w) of pairs (k,): posterior means, or samples if `deviations` are stored.

        noise: (k, C, h, w) standard normal, from a seed unique to the draw (law 4); None if only means are stored.
        """
        images = self.image_index[pairs]
        means = self.latents[images]
        if self.deviations is None:
            return means
        assert noise is not None, "latents stored as moments need noise to be sampled"
        return means + self.deviations[images] * noise

    def training_pairs(self) -> Tensor:
        """Return the indices of the pairs that training may use, (P_train,)."""
        return self.images.training_pairs()

    def conditions(
        self, pairs: Tensor, device: torch.device | str = "cpu", dropped: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the conditions of the captions of `pairs` (n,), by role, as `Denoiser.call` takes them.

        dropped: (n,) bool, the samples that get the empty caption instead; None: no sample.
        """
        dropped = torch.zeros(len(pairs), dtype=torch.bool) if dropped is None else dropped

        def chosen(values: Tensor | Rows, null: Tensor) -> Tensor:
            mask = dropped.view(-1, *[1] * null.dim())
            return to_device(torch.where(mask, null, values[pairs]), device)

        conditions = {"text": chosen(self.text, self.null_text)}
        if self.pooled is not None:
            assert self.null_pooled is not None
            conditions["pooled"] = chosen(self.pooled, self.null_pooled)
        conditions |= {role: chosen(values, null) for role, (values, null) in self.others.items()}
        if self.time_ids is not None:
            conditions["sizes"] = to_device(self.time_ids.expand(len(pairs), -1), device)
        return conditions


def encode(
    pipeline: DiffusionPipeline,
    images: CaptionedImages,
    prompt_encoder: Any,
    resolution: int,
    cache: Path | None = None,
    config: CacheConfig | None = None,
    verify: bool = False,
) -> EncodedData:
    """Run the frozen encoders over a data set, or read the result of an earlier call with the same input from `cache`.

    Pictures that cannot be decoded are left out with their captions, so `images` of the result may hold fewer.

    Args:
        pipeline: pipeline whose autoencoder and text encoders run, on their device.
        images: the data.
        prompt_encoder: object with `.encode(list of str) -> (n, Z)`.
        resolution: side of the pictures in pixels.
        cache: directory of encoded data; other processes and other data may use it at the same time. None: the rows
            stay in memory, in float32.
        config: which parts are stored; the other parts are computed each time that they are requested.
        verify: compare the checksum of every file of the cache, not only of files that changed since the last start.

    Raises:
        DataError: more pictures cannot be decoded than `images.tolerance` allows.

    """
    config, encoders = config or CacheConfig(), FrozenEncoders(pipeline, resolution)
    maker = PartMaker(encoders, config, cache, verify)
    latents = maker.latents(images)
    images = images.without(
        {index: why for index, (_, why) in latents.bad.items()},
        {index: name for index, (name, _) in latents.bad.items()},
    )
    prompts = maker.prompts(prompt_encoder, images.captions)
    text: Mapping[str, Tensor | Rows]
    null: Mapping[str, Tensor | Rows]
    if config.text:
        text, null = maker.text(images.captions).rows, maker.null_text().rows
    else:
        null, states = encoders.null_states(), CaptionStates(encoders, images.captions)
        text = {name: LiveText(states, name, tuple(value.shape[1:])) for name, value in null.items()}
    added: dict[str, Any] = {}
    if "pooled" in text:
        added = {"pooled": text["pooled"], "null_pooled": null["pooled"][0]}
    if "sizes" in encoders.roles:
        added["time_ids"] = encoders.family.sizes(resolution, resolution)
    added["others"] = {role: (text[role], null[role][0]) for role in text if role not in ("text", "pooled")}
    key = Fingerprint(latents.key, prompts.key, resolution, config.model_dump(exclude={"directory"}))
    key.add(encoders.picture_key, encoders.text_key)
    return EncodedData(
        latents=latents.rows["mean"] if latents.rows else LiveLatents(encoders, images),
        text=text["text"],
        null_text=null["text"][0],
        prompts=prompts.rows["prompts"],
        images=images,
        deviations=latents.rows.get("deviation"),
        key=key.add_tensor(images.image_index).add_tensor(images.held_out).key(),
        **added,
    )
