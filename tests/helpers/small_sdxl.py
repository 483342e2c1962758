"""Very small Stable Diffusion XL and 1.x pipelines with real tokenizers and random weights."""

from pathlib import Path

import torch
from diffusers import (
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from small_model import CAPTIONS, SHAPES
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from unets import CONFIGS, randomize_norms

from prunekit.models import emoji_model

WIDTH, POOLED = 16, 24  # of each text encoder, and of the pooled embedding
SCHEDULE = {**emoji_model.NOISE_SCHEDULE, "prediction_type": "epsilon"}


def text_encoder(tokenizer, width: int, kind=CLIPTextModel, **settings):
    """Return a CLIP text encoder with two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=emoji_model.TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    return kind(config)


def build_xl() -> StableDiffusionXLPipeline:
    """Return a pipeline like SDXL: two text encoders, added conditioning, two transformer blocks per layer."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        first, second = (emoji_model.build_tokenizer(CAPTIONS, SHAPES.vocabulary) for _ in range(2))
        config = {**CONFIGS["sdxl"], "cross_attention_dim": 2 * WIDTH}
        config["projection_class_embeddings_input_dim"] = POOLED + 6 * config["addition_time_embed_dim"]
        return StableDiffusionXLPipeline(
            vae=emoji_model.build_autoencoder(SHAPES),
            text_encoder=text_encoder(first, WIDTH),
            text_encoder_2=text_encoder(second, WIDTH, CLIPTextModelWithProjection, projection_dim=POOLED),
            tokenizer=first,
            tokenizer_2=second,
            unet=randomize_norms(UNet2DConditionModel(sample_size=8, **config)),
            scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading"),
            add_watermarker=False,
        )


def build_sd1() -> StableDiffusionPipeline:
    """Return a pipeline like Stable Diffusion 1: epsilon prediction, one `attention_head_dim`, no linear projection."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        tokenizer = emoji_model.build_tokenizer(CAPTIONS, SHAPES.vocabulary)
        return StableDiffusionPipeline(
            vae=emoji_model.build_autoencoder(SHAPES),
            text_encoder=text_encoder(tokenizer, CONFIGS["sd1"]["cross_attention_dim"]),
            tokenizer=tokenizer,
            unet=randomize_norms(UNet2DConditionModel(sample_size=8, **CONFIGS["sd1"])),
            scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def write(folder: Path, family: str, **options) -> Path:
    """Write the pipeline of a family, "sd1" or "sdxl", to `folder`; its weights are the same in every call."""
    {"sd1": build_sd1, "sdxl": build_xl}[family]().save_pretrained(folder, **options)
    return folder
