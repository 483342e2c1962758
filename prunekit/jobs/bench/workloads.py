"""The three things that are timed: one denoiser call, the whole sampling, and the whole image."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from prunekit.core.call import normal
from prunekit.core.registry import (
    call_options,
    denoiser_in,
    denoiser_of,
    family_of,
    pictures_of,
    scale_of,
    texts_of,
)
from prunekit.core.timesteps import sampled_timesteps
from prunekit.evaluation.generate import quiet
from prunekit.jobs.bench.bench_models import PROMPT


def pipeline_call(
    pipeline: DiffusionPipeline,
    workload: str,
    resolution: int,
    batch: int,
    guidance: float,
    steps: int,
    stack: ExitStack,
    seed: int = 0,
) -> Callable[[], Tensor]:
    """Return a function that runs the stock pipeline once: its loop alone ("sampling"), or completely ("image").

    stack: keeps the pipeline's progress bar and safety checker off until it closes.
    """
    stack.enter_context(quiet(pipeline))
    model, scale = denoiser_in(pipeline), scale_of(pipeline)
    assert scale is not None, "a pipeline has an autoencoder"
    side = resolution // scale
    generator = torch.Generator().manual_seed(seed)
    denoiser = denoiser_of(model)
    example = denoiser.example(model, batch, (side, side), 1, normal(generator))
    latents = denoiser.starting(example).to(model.device, model.dtype)
    prompts = [PROMPT] * batch
    common = {
        "height": resolution,
        "width": resolution,
        "num_inference_steps": steps,
        "latents": latents,
    }
    if workload == "image":
        common |= call_options(pipeline, guidance)
        # Each call gets a copy of the prompts, because a pipeline may change the list
        return lambda: pictures_of(pipeline, pipeline(prompt=list(prompts), output_type="pt", **common))
    family = family_of(pipeline)
    common |= family.call_options(pipeline, guidance)
    with torch.no_grad():
        embeddings = family.embeddings(pipeline, prompts, None, texts_of(pipeline, guidance) > 1)
    return lambda: pictures_of(pipeline, pipeline(output_type="latent", **embeddings, **common))


def denoiser_calls(pipeline: DiffusionPipeline, steps: int) -> int:
    """Return how often a pipeline's loop calls the denoiser."""
    return len(sampled_timesteps(pipeline.scheduler, steps))
