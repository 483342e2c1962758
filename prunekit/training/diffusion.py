"""The denoising objective: add noise to a latent, and predict the target of the noise process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from prunekit.core.family import NoiseProcess
from prunekit.runtime.randomness import epoch_indices, generator

SNRForm = Literal["velocity", "published"]
SNR_GAMMA = (
    "Gamma of the min-SNR weights of the denoising error (Hang et al., 2023), usually 5; unset: all weights are 1."
)
SNR_FORM = (  # the setting's description
    "Form of the min-SNR weight for velocity prediction, if snr_gamma is set. velocity: min(SNR, gamma)/(SNR + "
    "1), of the min-SNR paper and current diffusers; published: min(SNR + 1, gamma)/(SNR + 1), of APTP's "
    "published code, with weight 1 for the noisiest timesteps. For noise prediction both are min(SNR, "
    "gamma)/SNR."
)
SHORT_ATTENTION = 256  # most tokens for which plain matrix products train faster on a CPU than torch's flash kernel


def shift_timesteps(timesteps: Tensor, shift: float, num_timesteps: int) -> Tensor:
    """Shift timesteps toward the noisy end: T·s·t/(T + (s - 1)·t) (Esser et al., 2024, Eq. 23).

    timesteps: t, from 0 to T = `num_timesteps`.
    shift: s; 1 changes nothing.
    """
    shifted = num_timesteps * shift * timesteps / (num_timesteps + (shift - 1) * timesteps)
    return shifted.long().clamp(max=num_timesteps - 1)


def denoising_errors(
    prediction: Tensor,
    process: NoiseProcess,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    snr_gamma: float | None = None,
    snr_form: SNRForm = "velocity",
) -> Tensor:
    """Return each sample's denoising error, (B,), float32: the mean squared error to the target of the process.

    snr_gamma: gamma of the min-SNR weight that multiplies each error (`NoiseProcess.weights`); None: no weight.
    snr_form: form of that weight.
    """
    errors = per_sample_mse(prediction, process.target(latents, noise, timesteps))
    if snr_gamma is None:
        return errors
    return errors * process.weights(timesteps, snr_gamma, snr_form)


@contextmanager
def attention_kernel(model: nn.Module, latents: Tensor, recomputed: bool = False) -> Iterator[None]:
    """Open a context in which a model's attention uses the kernel that trains fastest on latents (B, C, h, w).

    For few tokens on a CPU, attention is plain matrix products in the precision of its inputs. For 8x8 latents, heads
    of 16 channels and bfloat16, plain products are 4 times as fast as torch's math kernel, which computes in float32,
    and 14 times as fast as torch's flash kernel with the backward pass; for many tokens, flash is faster. Results agree
    to rounding. A training step of the embedded transformer (80 tokens, heads of 32 channels) takes 0.83 times as long
    as without this context.
    recomputed: whether activations are computed again in the backward pass. That happens outside of this context, where
        another kernel would not fit the saved activations, so the choice is left to torch.
    """
    few = latents.shape[-2] * latents.shape[-1] <= SHORT_ATTENTION
    if not few or latents.device.type != "cpu" or recomputed:
        yield
        return
    attentions = [m for m in model.modules() if isinstance(m, Attention) and type(m.processor) is AttnProcessor2_0]
    before = [module.processor for module in attentions]
    plain = AttnProcessor()
    for module in attentions:
        module.processor = plain
    try:
        with sdpa_kernel(SDPBackend.MATH), PlainAttention():  # for other processors and networks
            yield
    finally:
        for module, processor in zip(attentions, before, strict=True):
            module.processor = processor


class PlainAttention(TorchFunctionMode):
    """A context in which torch's attention is plain matrix products, in the precision of its inputs."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return plain_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Return softmax(query·keyᵀ/√d + mask)·value.

    A call with dropout, a causal mask, a scale or grouped queries is left to torch.

    query: (…, n, d).
    key: (…, m, d).
    value: (…, m, e).
    attn_mask: added to the products, or boolean: false where a key is ignored.
    """
    if any(options.get(name) for name in ("dropout_p", "is_causal", "scale", "enable_gqa")):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    products = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        products = products.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        products = products + attn_mask
    return products.softmax(-1) @ value


@dataclass(frozen=True)
class NoisePlan:
    """The random draws of one step's global batch; they depend on the seed, the step and the position alone."""

    indices: Tensor  # (B,) into the training items
    timesteps: Tensor  # (B,)
    noise: Tensor  # (B, C, h, w)
    choice: Tensor  # (B,) uniform in [0, 1): chooses a caption
    drop: Tensor  # (B,) uniform in [0, 1): caption dropout
    posterior: Tensor | None = None  # (B, C, h, w): noise that samples latents from stored moments

    @classmethod
    def draw(
        cls,
        step: int,
        seed: int,
        batch_size: int,
        num_items: int,
        latent_shape: tuple[int, ...],
        process: NoiseProcess,
        sampled: bool = False,
    ) -> "NoisePlan":
        """Draw the plan of a step.

        latent_shape: (C, h, w).
        sampled: whether to draw `posterior` too, from its own random stream.
        """
        source = generator(seed, "noise", step)
        return cls(
            indices=epoch_indices(num_items, batch_size, seed, step),
            timesteps=process.draw(batch_size, source),
            noise=torch.randn(batch_size, *latent_shape, generator=source),
            choice=torch.rand(batch_size, generator=source),
            drop=torch.rand(batch_size, generator=source),
            posterior=torch.randn(batch_size, *latent_shape, generator=generator(seed, "posterior", step))
            if sampled
            else None,
        )

    def posterior_at(self, positions: Tensor) -> Tensor | None:
        """Return the noise in `posterior` at some positions (n,), (n, C, h, w); None if none was drawn."""
        return None if self.posterior is None else self.posterior[positions]


def per_sample_mse(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return the mean squared error of each sample, (B,), in float32."""
    return (prediction.float() - reference.float()).square().flatten(1).mean(1)
