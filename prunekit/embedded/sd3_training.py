"""Train the second embedded model's transformer by flow matching, with the first model's frozen encoders.

The pipeline appends T5's tokens to CLIP's tokens. A stand-in replaces T5, and its tokens are all zero. n identical
tokens act as one token whose attention logit is raised by ln n. So training runs one zero token and draws n at random,
and the trained model works with any number of zero tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunekit.core.call import predict
from prunekit.core.family import NoiseProcess
from prunekit.core.registry import denoiser_of
from prunekit.data.encoded import EncodedData
from prunekit.embedded.unet_training import TrainingPairs
from prunekit.runtime.randomness import generator
from prunekit.runtime.tensors import to_device
from prunekit.training.diffusion import NoisePlan, attention_kernel, per_sample_mse

ZERO_TOKENS = (1, 1, 16, 256)  # numbers of zero tokens, of which each step draws one


class AsManyTokens(TorchFunctionMode):
    """A context in which joint attention counts its last token as `count` identical tokens.

    keys: number of tokens of a joint attention; attention over another number of tokens is not changed.
    """

    def __init__(self, keys: int, count: int):
        super().__init__()
        self.keys, self.raised = keys, math.log(count)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[1].shape[-2] == self.keys and self.raised:
            mask = args[0].new_zeros(self.keys)
            mask[-1] = self.raised
            kwargs = {**kwargs, "attn_mask": mask.view(1, 1, 1, -1)}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class FlowPlan:
    """The draws of a step, and the number of zero tokens that its one zero token stands for."""

    noise: NoisePlan
    zero_tokens: int


@dataclass
class FlowObjective:
    """Flow matching: the transformer predicts the direction from data to noise."""

    model: SD3Transformer2DModel
    process: NoiseProcess
    data: EncodedData
    batch_size: int
    seed: int
    caption_dropout: float
    device: torch.device

    @cached_property
    def training(self) -> TrainingPairs:
        """The training captions, from which each step chooses."""
        return TrainingPairs(self.data.images)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return the module that is trained."""
        return {"transformer": self.model}

    def batch(self, step: int) -> FlowPlan:
        """Draw a step's images, captions, timesteps, noise, and number of zero tokens."""
        latents = self.data.latents
        sizes = (self.batch_size, len(latents), tuple(latents.shape[1:]), self.process)
        chosen = torch.randint(len(ZERO_TOKENS), (), generator=generator(self.seed, "zero tokens", step))
        return FlowPlan(NoisePlan.draw(step, self.seed, *sizes), ZERO_TOKENS[int(chosen)])

    def shared_loss(self, batch: FlowPlan) -> dict[str, Tensor]:
        """Return no terms: none of them needs the whole batch."""
        return {}

    def micro_loss(self, batch: FlowPlan, positions: Tensor) -> dict[str, Tensor]:
        """Return the denoising error, summed over `positions` and divided by the batch size."""
        plan = batch.noise
        indices, drop = plan.indices[positions], plan.drop[positions] < self.caption_dropout
        pairs = self.training.choose(indices, plan.choice[positions])
        conditions = self.data.conditions(pairs, self.device, drop)
        drawn = (self.data.latents[indices], plan.noise[positions], plan.timesteps[positions])
        latents, noise, timesteps = (to_device(values, self.device) for values in drawn)
        noisy = self.process.noised(latents, noise, timesteps)
        denoiser = denoiser_of(self.model)
        height, width = latents.shape[-2:]
        keys = denoiser.lengths(self.model, (height, width), conditions["text"].shape[1])["joint"]
        with attention_kernel(self.model, noisy), AsManyTokens(keys, batch.zero_tokens):
            prediction = predict(self.model, denoiser.call(noisy, timesteps, conditions))
        error = per_sample_mse(prediction, self.process.target(latents, noise, timesteps))
        return {"denoising": error.sum() / self.batch_size}
