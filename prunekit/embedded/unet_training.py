"""Train the embedded model's UNet and text encoder together on cached latents."""

from dataclasses import dataclass, replace

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from prunekit.core.call import predict
from prunekit.core.family import NoiseProcess
from prunekit.core.registry import denoiser_of
from prunekit.data.images import CaptionedImages
from prunekit.runtime.tensors import to_device
from prunekit.training.diffusion import NoisePlan, attention_kernel, per_sample_mse, shift_timesteps


class TrainingPairs:
    """The training captions of each image; every image must have at least one."""

    def __init__(self, data: CaptionedImages):
        pairs = data.training_pairs()
        order = pairs[torch.argsort(data.image_index[pairs], stable=True)]
        self.pairs = order  # training pairs, grouped by image
        self.count = torch.bincount(data.image_index[order], minlength=data.num_images)  # (n,)
        assert bool(self.count.all()), "an image without a training caption would get another image's"
        self.first = self.count.cumsum(0) - self.count

    def choose(self, images: Tensor, choice: Tensor) -> Tensor:
        """Return the index of a training pair for each image, (B,); choice: (B,), uniform in [0, 1)."""
        return self.pairs[self.first[images] + (choice * self.count[images]).long()]


class CaptionTable:
    """Token ids of the captions and of the empty caption, with a choice among each image's training captions."""

    def __init__(self, data: CaptionedImages, tokenizer: CLIPTokenizer):
        def ids(texts: list[str]) -> Tensor:
            length = tokenizer.model_max_length
            return tokenizer(
                texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).input_ids

        self.ids, self.empty = ids(data.captions), ids([""])[0]  # (P, T), (T,)
        self.training = TrainingPairs(data)

    def choose(self, images: Tensor, choice: Tensor, drop: Tensor, dropout: float) -> Tensor:
        """Return token ids (B, T): for each image a training caption, or the empty caption where drop < dropout."""
        return torch.where((drop < dropout)[:, None], self.empty, self.ids[self.training.choose(images, choice)])


@dataclass
class PretrainingObjective:
    """v- or epsilon-prediction; the text encoder is trained with the UNet.

    `timestep_shift` above 1 draws the noisiest timesteps more often; there the text determines the picture.
    """

    model: ModelMixin
    text_encoder: CLIPTextModel
    process: NoiseProcess
    latents: Tensor  # (n, C, h, w), scaled
    captions: CaptionTable
    batch_size: int
    seed: int
    caption_dropout: float
    timestep_shift: float
    device: torch.device

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return the modules that are trained, by the names that checkpoints give them."""
        return {"unet": self.model, "text_encoder": self.text_encoder}

    def batch(self, step: int) -> NoisePlan:
        """Draw a step's images, captions, timesteps and noise."""
        sizes = (self.batch_size, len(self.latents), tuple(self.latents.shape[1:]), self.process)
        plan = NoisePlan.draw(step, self.seed, *sizes)
        shifted = shift_timesteps(plan.timesteps, self.timestep_shift, self.process.num_timesteps)
        return replace(plan, timesteps=shifted)

    def shared_loss(self, batch: NoisePlan) -> dict[str, Tensor]:
        """Return no terms: none of them needs the whole batch."""
        return {}

    def micro_loss(self, batch: NoisePlan, positions: Tensor) -> dict[str, Tensor]:
        """Return the denoising error, summed over `positions` and divided by the batch size."""
        indices = batch.indices[positions]
        ids = self.captions.choose(indices, batch.choice[positions], batch.drop[positions], self.caption_dropout)
        drawn = (self.latents[indices], batch.noise[positions], batch.timesteps[positions])
        latents, noise, timesteps = (to_device(values, self.device) for values in drawn)
        noisy = self.process.noised(latents, noise, timesteps)
        with attention_kernel(self.model, noisy):
            text = self.text_encoder(to_device(ids, self.device)).last_hidden_state
            prediction = predict(self.model, denoiser_of(self.model).call(noisy, timesteps, {"text": text}))
        error = per_sample_mse(prediction, self.process.target(latents, noise, timesteps))
        return {"denoising": error.sum() / self.batch_size}
