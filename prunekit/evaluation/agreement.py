"""How closely a pruned UNet predicts what the dense one does: a quality figure without any sampling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.data.encoded import EncodedData
from prunekit.errors import UserError
from prunekit.randomness import epoch_indices, generator

SAMPLES = 256


@dataclass(frozen=True)
class AgreementSamples:
    """Fixed inputs of the UNets: one noisy latent, timestep and text a sample."""

    indices: Tensor  # (n,) int64: the rows of the latents and texts that were drawn
    noisy: Tensor  # (n, C, h, w)
    timesteps: Tensor  # (n,) int64
    text: Tensor  # (n, T, E)
    added: dict[str, Tensor] | None = None  # added_cond_kwargs, (n, ...) each, where the UNet has them (SDXL)

    def inputs(self, rows: Tensor, like: Tensor) -> dict[str, Any]:
        """Return keyword arguments of a UNet call for some rows (m,), on the device and in the dtype of `like`."""
        inputs: dict[str, Any] = {
            "sample": self.noisy[rows].to(like),
            "timestep": self.timesteps[rows].to(like.device),
            "encoder_hidden_states": self.text[rows].to(like),
        }
        if self.added is not None:
            inputs["added_cond_kwargs"] = {name: values[rows].to(like) for name, values in self.added.items()}
        return inputs


def agreement_samples(
    latents: Tensor,
    text: Tensor,
    scheduler: Any,
    seed: int = 0,
    count: int = SAMPLES,
    added: Mapping[str, Tensor] | None = None,
) -> AgreementSamples:
    """Draw `count` triples (latents of a picture and its text, timestep, noise), the same for the same seed.

    `latents` (n, C, h, w) are scaled as the UNet expects, `text` (n, T, E) are the hidden states of their captions;
    `scheduler` is a diffusers training scheduler (`add_noise`). Where `count` exceeds n, rows come again. `added` are
    the captions' `added_cond_kwargs`, (n, ...) each, of an SDXL-shaped UNet: `EncodedData.conditions` returns them.
    """
    if len(latents) != len(text) or not len(latents):
        raise UserError(f"agreement needs one text a latent, got {len(latents)} latents and {len(text)} texts")
    indices = epoch_indices(len(latents), count, seed, 0)
    own = None if added is None else {name: values[indices] for name, values in added.items()}
    return _noised(indices, latents[indices], text[indices], scheduler, seed, own)


def data_samples(data: EncodedData, scheduler: Any, seed: int = 0, count: int = SAMPLES) -> AgreementSamples:
    """Draw the samples of `agreement_samples` among a data set's pairs, and read no other row of it."""
    indices = epoch_indices(data.images.num_pairs, count, seed, 0)
    conditions = data.conditions(indices)
    latents, text = data.latents[data.image_index[indices]], conditions["encoder_hidden_states"]
    return _noised(indices, latents, text, scheduler, seed, conditions.get("added_cond_kwargs"))


def _noised(
    indices: Tensor, latents: Tensor, text: Tensor, scheduler: Any, seed: int, added: Mapping[str, Tensor] | None
) -> AgreementSamples:
    count = len(indices)
    draws = generator(seed, "agreement")
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (count,), generator=draws)
    noise = torch.randn(count, *latents.shape[1:], generator=draws)
    noisy = scheduler.add_noise(latents.cpu().float(), noise, timesteps)
    own = {name: values.cpu().float() for name, values in added.items()} if added is not None else None
    return AgreementSamples(indices, noisy, timesteps, text.cpu().float(), own)


@torch.no_grad()
def predictions(unet: nn.Module, samples: AgreementSamples, rows: Tensor | None = None, batch_size: int = 32) -> Tensor:
    """Return the UNet's predictions (n, C, h, w), float32 on the CPU, of the samples or of the given `rows` of them."""
    rows = torch.arange(len(samples.noisy)) if rows is None else rows
    parameter = next(unet.parameters())
    outputs = []
    for part in rows.split(batch_size):
        outputs.append(unet(**samples.inputs(part, parameter)).sample.float().cpu())
    return torch.cat(outputs)


def agreement(
    dense: nn.Module | Tensor,
    student: nn.Module | Sequence[nn.Module],
    samples: AgreementSamples,
    expert: Tensor | None = None,
    batch_size: int = 32,
) -> float:
    """Return the mean squared difference of the student's and the dense UNet's predictions; lower is better.

    `dense` is the UNet or its `predictions`, which several students may share. For routed experts, `student` is their
    list and `expert` (n,) says which one a sample's prompt is sent to.
    Raises ValueError where `expert` does not name one expert a sample.
    """
    target = dense if isinstance(dense, Tensor) else predictions(dense, samples, batch_size=batch_size)
    experts = [student] if isinstance(student, nn.Module) else student
    if expert is None and len(experts) == 1:
        expert = torch.zeros(len(target), dtype=torch.long)
    if expert is None or len(expert) != len(target) or not 0 <= int(expert.min()) <= int(expert.max()) < len(experts):
        raise UserError(f"agreement of {len(experts)} experts needs each of the {len(target)} samples' expert index")
    total = 0.0
    for index in expert.unique().tolist():
        rows = torch.nonzero(expert == index).flatten()
        errors = predictions(experts[index], samples, rows, batch_size) - target[rows]
        total += float(errors.double().square().sum())
    return total / target.numel()
