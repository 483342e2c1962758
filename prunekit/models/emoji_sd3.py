"""The second embedded text-to-image model: Stable Diffusion 3 in miniature, around the first one's encoders."""

from dataclasses import dataclass
from typing import Annotated

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from pydantic import BaseModel, ConfigDict, Field
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from transformers import T5TokenizerFast as T5Tokenizer

from prunekit.core.registry import denoiser_in, latent_size
from prunekit.denoisers.sd3 import miniature

Size = Annotated[int, Field(ge=1, le=4096)]
ZERO_TOKENS = 1  # largest text length, as stated by the tokenizer of the stand-in for T5


class EmojiSD3Config(BaseModel):
    """Shapes of the transformer."""

    model_config = ConfigDict(extra="forbid")

    layers: int = Field(6, ge=1, le=100, description="Number of transformer blocks.")
    heads: Size = Field(6, description="Attention heads per block.")
    head_channels: Size = Field(32, description="Channels per head.")
    dual_layers: list[int] = Field(
        [0], description="Blocks with a second attention over the image only (SD 3.5 medium)."
    )
    patch: int = Field(1, ge=1, le=8, description="Side of the square of latent positions that forms a token.")
    shift: float = Field(2.0, gt=0, description="Shift of the noise levels towards noise, in training and sampling.")


@dataclass(frozen=True)
class BaseShape:
    """Sizes of a base model that a transformer must fit: width of CLIP's states, side and channels of the latents."""

    text_width: int
    side: int
    channels: int

    @classmethod
    def of(cls, base: StableDiffusionPipeline) -> "BaseShape":
        """Return the sizes of a base pipeline."""
        side, _ = latent_size(denoiser_in(base))
        return cls(base.text_encoder.config.hidden_size, side, base.vae.config.latent_channels)


def build_transformer(config: EmojiSD3Config, base: BaseShape) -> SD3Transformer2DModel:
    """Build the untrained transformer for the latents and texts of a base model."""
    width = 2 * base.text_width  # both CLIP encoders' states side by side
    return miniature.build(
        sample_size=base.side,
        channels=base.channels,
        layers=config.layers,
        heads=config.heads,
        head_channels=config.head_channels,
        text_width=width,
        pooled_width=width,
        dual_layers=tuple(config.dual_layers),
        patch=config.patch,
    )


def projected(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Return a copy of a CLIP text encoder with an identity projection of its pooled state."""
    settings = {**encoder.config.to_dict(), "projection_dim": encoder.config.hidden_size}
    model = CLIPTextModelWithProjection(CLIPTextConfig(**settings))
    state = {
        name if name.startswith("text_model.") else f"text_model.{name}": v for name, v in encoder.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["text_projection.weight"] and not unexpected, (missing, unexpected)
    with torch.no_grad():
        model.text_projection.weight.copy_(torch.eye(encoder.config.hidden_size))
    return model.eval()


def stand_in(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """Return a stand-in for T5: an encoder whose states are all zero, and a tokenizer of one token per text."""
    config = T5Config(
        vocab_size=8, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1, feed_forward_proj="gated-gelu"
    )
    encoder = T5EncoderModel(config).eval()
    with torch.no_grad():
        encoder.encoder.final_layer_norm.weight.zero_()
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    return encoder, T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=ZERO_TOKENS)


def assemble(
    base: StableDiffusionPipeline, transformer: SD3Transformer2DModel, shift: float
) -> StableDiffusion3Pipeline:
    """Put the trained transformer and a base pipeline's autoencoder, text encoder and tokenizer together.

    The pipeline needs three text encoders: it gets the base pipeline's encoder twice, and the stand-in for T5.
    """
    autoencoder = AutoencoderKL.from_config({**base.vae.config, "shift_factor": 0.0})
    autoencoder.load_state_dict(base.vae.state_dict())
    encoder, tokenizer = stand_in(2 * base.text_encoder.config.hidden_size)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=autoencoder.eval(),
        text_encoder=projected(base.text_encoder),
        tokenizer=base.tokenizer,
        text_encoder_2=projected(base.text_encoder),
        tokenizer_2=base.tokenizer,
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )
