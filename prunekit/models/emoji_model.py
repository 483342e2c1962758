"""The parts of the embedded text-to-image model: Stable Diffusion 2's topology in miniature, still untrained."""

from typing import Annotated

from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin, PNDMScheduler, StableDiffusionPipeline
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from prunekit.denoisers.unet.miniature import build
from prunekit.runtime.errors import UserError

TOKENS = 16
FIRST_TOKENS = 2 * 256 + 2  # tokens of any vocabulary: each byte within and at the end of a word, start, end
NORM_GROUPS = 8  # of the autoencoder
TEXT_HEAD = 32  # channels of each head of the text encoder
Size = Annotated[int, Field(ge=1, le=4096)]
Levels = tuple[Size, Size, Size, Size]
START, END = "<|startoftext|>", "<|endoftext|>"


class EmojiModelConfig(BaseModel):
    """Shapes of the embedded model's parts."""

    model_config = ConfigDict(extra="forbid")

    image_size: int = Field(64, ge=8, le=1024, multiple_of=8, description="Side of a picture in pixels.")
    latent_channels: Size = Field(
        8, description="Channels of the latent, whose sides are 8 times smaller than the picture's."
    )
    autoencoder_channels: Levels = Field((32, 48, 96, 96), description="Channels of the autoencoder's levels.")
    unet_channels: Levels = Field((64, 96, 96, 96), description="Channels of the UNet's levels.")
    unet_heads: Levels = Field((4, 6, 6, 6), description="Attention heads of the UNet's levels.")
    norm_groups: Size = Field(16, description="GroupNorm groups of the UNet, which are the units of a ResBlock.")
    text_width: Size = Field(128, multiple_of=TEXT_HEAD, description="Channels of the text encoder, a multiple of 32.")
    text_layers: int = Field(3, ge=1, le=100, description="Layers of the text encoder.")
    vocabulary: int = Field(
        2000,
        ge=FIRST_TOKENS,
        le=65536,
        description="Largest size of the BPE vocabulary; 514 tokens stand for single bytes and a text's start and end.",
    )

    @model_validator(mode="after")
    def _divisible(self) -> "EmojiModelConfig":
        widths = zip(self.unet_channels, self.unet_heads, strict=True)
        if any(width % heads or width % self.norm_groups for width, heads in widths):
            raise UserError(
                f"shapes.unet_channels={self.unet_channels}: each must be a multiple of its unet_heads "
                f"{self.unet_heads} and of norm_groups={self.norm_groups}"
            )
        if any(width % NORM_GROUPS for width in self.autoencoder_channels):
            raise UserError(
                f"shapes.autoencoder_channels={self.autoencoder_channels}: each must be a multiple of {NORM_GROUPS}"
            )
        return self


def build_tokenizer(captions: list[str], vocabulary: int) -> CLIPTokenizer:
    """Train a CLIP-style byte-level BPE tokenizer on the captions; every byte has a token, so no text is unknown."""
    backend = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(_byte_alphabet())
    base = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    trainable = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainable.normalizer, trainable.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(base),
        min_frequency=2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trainable.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in _merges(trainable)]
    tokens = list(dict.fromkeys([*base, *("".join(pair) for pair in merges), START, END]))
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=TOKENS
    )


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    import json

    return [
        pair.split(" ") if isinstance(pair, str) else pair for pair in json.loads(tokenizer.to_str())["model"]["merges"]
    ]


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def build_autoencoder(config: EmojiModelConfig) -> AutoencoderKL:
    """Build the 8x autoencoder (convolutions only)."""
    levels = len(config.autoencoder_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.autoencoder_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=NORM_GROUPS,
        sample_size=config.image_size,
        mid_block_add_attention=False,
    )


def build_unet(config: EmojiModelConfig) -> ModelMixin:
    """Build a UNet of Stable Diffusion 2's topology: three cross-attention levels and a plain one, two layers each."""
    return build(
        sample_size=config.image_size // 8,
        channels=config.latent_channels,
        widths=config.unet_channels,
        heads=config.unet_heads,
        text_width=config.text_width,
        norm_groups=config.norm_groups,
    )


def build_text_encoder(config: EmojiModelConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build a small CLIP text encoder for the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_width // TEXT_HEAD,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
}


def training_scheduler() -> DDPMScheduler:
    """Return the scheduler that adds the noise in training."""
    return DDPMScheduler(**NOISE_SCHEDULE, clip_sample=False)


def assemble(
    autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: ModelMixin
) -> StableDiffusionPipeline:
    """Put trained parts together as a stock Stable Diffusion pipeline with a PNDM scheduler."""
    scheduler = PNDMScheduler(**NOISE_SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
