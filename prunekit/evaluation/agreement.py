"""Agreement of a pruned model's predictions with the dense model's: a quality figure that needs no sampling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.core.call import Call, predict
from prunekit.core.registry import denoiser_in, denoiser_of, process_of
from prunekit.data.encoded import EncodedData
from prunekit.runtime.errors import UserError
from prunekit.runtime.randomness import epoch_indices, generator

SAMPLES = 256


@dataclass(frozen=True)
class AgreementSamples:
    """Fixed inputs of the models: one noisy latent, timestep and text per sample."""

    indices: Tensor  # (n,) int64: the rows of the latents and texts that were drawn
    call: Call  # of all n samples, float32 on the CPU


def agreement_samples(
    latents: Tensor,
    conditions: Mapping[str, Tensor],
    pipeline: Any,
    seed: int = 0,
    count: int = SAMPLES,
) -> AgreementSamples:
    """Draw `count` triples (a picture's latents and text, timestep, noise), the same for the same seed.

    Args:
        latents: (n, C, h, w), scaled as the denoiser expects.
        conditions: conditions of the pictures' captions by role, (n, …) each, as `EncodedData.conditions` returns them.
        pipeline: pipeline with the denoiser to call and the scheduler that adds the noise.
        seed: seed of the draws.
        count: number of samples; above n, rows repeat.

    Raises:
        UserError: there are no latents, or not as many conditions as latents.

    """
    if len(latents) != len(conditions["text"]) or not len(latents):
        texts = len(conditions["text"])
        raise UserError(f"agreement needs one text per latent, got {len(latents)} latents and {texts} texts")
    indices = epoch_indices(len(latents), count, seed, 0)
    drawn = {role: values[indices] for role, values in conditions.items()}
    return _noised(indices, latents[indices], drawn, pipeline, seed)


def data_samples(
    data: EncodedData, pipeline: Any, seed: int = 0, count: int = SAMPLES, pairs: Tensor | None = None
) -> AgreementSamples:
    """Draw samples as `agreement_samples` does from a data set's pairs, and read only the rows that are drawn.

    pairs: (n,) indices of the pairs to draw from; None: all.
    """
    pairs = torch.arange(data.images.num_pairs) if pairs is None else pairs
    indices = pairs[epoch_indices(len(pairs), count, seed, 0)]
    return _noised(indices, data.latents[data.image_index[indices]], data.conditions(indices), pipeline, seed)


def _noised(
    indices: Tensor, latents: Tensor, conditions: Mapping[str, Tensor], pipeline: Any, seed: int
) -> AgreementSamples:
    process, draws = process_of(pipeline), generator(seed, "agreement")
    timesteps = process.draw(len(indices), draws)
    noise = torch.randn(len(indices), *latents.shape[1:], generator=draws)
    noisy = process.noised(latents.cpu().float(), noise, timesteps)
    call = denoiser_of(denoiser_in(pipeline)).call(noisy, timesteps, conditions)
    return AgreementSamples(indices, call.to("cpu", torch.float32))


@torch.no_grad()
def predictions(
    model: nn.Module, samples: AgreementSamples, rows: Tensor | None = None, batch_size: int = 32
) -> Tensor:
    """Return a model's predictions (n, C, h, w), float32 on the CPU, for all samples or only for the given `rows`."""
    rows = torch.arange(samples.call.batch) if rows is None else rows
    parts = [predict(model, samples.call.take(part).to(model)) for part in rows.split(batch_size)]
    return torch.cat([part.float().cpu() for part in parts])


def agreement(
    dense: nn.Module | Tensor,
    student: nn.Module | Sequence[nn.Module],
    samples: AgreementSamples,
    expert: Tensor | None = None,
    batch_size: int = 32,
) -> float:
    """Return the mean squared difference of the student's and the dense model's predictions; lower is better.

    Arguments and errors as in `agreement_errors`.
    """
    return float(agreement_errors(dense, student, samples, expert, batch_size).mean())


def agreement_errors(
    dense: nn.Module | Tensor,
    student: nn.Module | Sequence[nn.Module],
    samples: AgreementSamples,
    expert: Tensor | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Return each sample's mean squared difference of the student's and the dense model's predictions, (n,) float64.

    `dense` is the model or its `predictions`, which several students may share. For routed experts, `student` is the
    list of experts, and `expert` (n,) is the index of the expert to which each sample's prompt is routed.
    Raises ValueError if `expert` does not name one expert per sample.
    """
    target = dense if isinstance(dense, Tensor) else predictions(dense, samples, batch_size=batch_size)
    experts = [student] if isinstance(student, nn.Module) else student
    if expert is None and len(experts) == 1:
        expert = torch.zeros(len(target), dtype=torch.long)
    if expert is None or len(expert) != len(target) or not 0 <= int(expert.min()) <= int(expert.max()) < len(experts):
        raise UserError(f"agreement of {len(experts)} experts needs each of the {len(target)} samples' expert index")
    errors = torch.zeros(len(target), dtype=torch.float64)
    for index in expert.unique().tolist():
        rows = torch.nonzero(expert == index).flatten()
        differences = predictions(experts[index], samples, rows, batch_size) - target[rows]
        errors[rows] = differences.double().square().flatten(1).mean(1)
    return errors
