"""Stock pipelines with small transformers, and the other components of each pipeline class."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogView4Pipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    QwenImagePipeline,
    SanaPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    ZImagePipeline,
)
from small_transformers import build, randomize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from prunekit.models import emoji_sd3


def small_t5(width: int) -> tuple[Any, Any]:
    """Return a T5 encoder with random weights, and a tokenizer of one token."""
    torch.manual_seed(1)
    config = T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    return T5EncoderModel(config).eval(), emoji_sd3.stand_in(width)[1]


CHAT = (
    "{% for message in messages %}<{{ message.role }}> "
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def small_chat_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with a chat template."""
    alphabet = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", chat_template=CHAT, model_max_length=1024
    )


def small_language_model(width: int, layers: int, is_mistral: bool = False) -> Any:
    """Return a Qwen3, or a Mistral 3 with its vision tower, with random weights."""
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 257,
        "hidden_size": width,
        "intermediate_size": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    if not is_mistral:
        return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **sizes},
        vision_config={"model_type": "pixtral", "image_size": 28, "patch_size": 14, **vision},
    )
    return Mistral3ForConditionalGeneration(config).eval()


def small_normed_autoencoder(channels: int = 4) -> AutoencoderKLFlux2:
    """Return an autoencoder with a batch norm of patches and one downsampling."""
    torch.manual_seed(2)
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
    ).eval()
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    return autoencoder


def small_autoencoder(channels: int = 4, shift: float | None = 0.25) -> AutoencoderKL:
    """Return an autoencoder with random weights and one downsampling."""
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=shift,
    ).eval()


LETTERS = "▁abcdefghijklmnopqrstuvwxyz"
FLOW_STEPS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
VIDEOS = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
MOMENTS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}


def small_sana(transformer: Any) -> SanaPipeline:
    """Return a pipeline with a Gemma of short words and an autoencoder with one downsampling, with random weights."""
    torch.manual_seed(2)
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    ).eval()
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *LETTERS]
    letters = GemmaTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer = letters.train_new_from_iterator(["\n".join(instruction), *LETTERS], 300)  # shortens the instruction
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Gemma2Config(vocab_size=len(tokenizer), **sizes, **heads, pad_token_id=0)
    scheduler = DPMSolverMultistepScheduler(**FLOW_STEPS)
    return SanaPipeline(tokenizer, Gemma2Model(config).eval(), autoencoder, transformer, scheduler)


def small_wan(transformer: Any) -> WanPipeline:
    """Return a pipeline with a UMT5 that reads letters and an autoencoder with two downsamplings; random weights."""
    torch.manual_seed(2)
    smaller = {"dim_mult": [1, 1, 1], "temperal_downsample": [False, False], "scale_factor_spatial": 4}
    autoencoder = AutoencoderKLWan(**{**VIDEOS, **smaller}, **MOMENTS).eval()
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in LETTERS)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    config = UMT5Config(vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    scheduler = UniPCMultistepScheduler(**FLOW_STEPS)
    return WanPipeline(tokenizer, UMT5EncoderModel(config).eval(), autoencoder, scheduler, transformer)


def small_cogview4(transformer: Any) -> CogView4Pipeline:
    """Return a pipeline with a GLM that reads bytes, padded on the left like GLM's texts, and an autoencoder."""
    tokenizer = small_chat_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<sop>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<sop> $A", special_tokens=[("<sop>", tokenizer.bos_token_id)]
    )
    tokenizer.padding_side = "left"
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    encoder = GlmModel(GlmConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes, **heads)).eval()
    shift = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear", **shift)
    return CogView4Pipeline(tokenizer, encoder, small_autoencoder(shift=None), transformer, scheduler)


@torch.no_grad()
def make(name: str, base: DiffusionPipeline) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Return a stock pipeline with a small transformer, and arguments of its call.

    base: the embedded model's pipeline, whose encoders are used.
    """
    transformer = build(name.partition("_klein")[0])
    if name == "sd35":
        transformer = emoji_sd3.build_transformer(emoji_sd3.EmojiSD3Config(layers=2), emoji_sd3.BaseShape.of(base))
        randomize(transformer)
        for parameter in transformer.parameters():
            if not parameter.any():  # matrices that are initialized to 0 and would make the output 0
                torch.nn.init.normal_(parameter, std=0.1)
        return emoji_sd3.assemble(base, transformer, 2.0), {"guidance_scale": 3.0, "max_sequence_length": 1}
    if name == "flux":
        encoder, tokenizer = small_t5(32)
        clip = CLIPTextModel(
            CLIPTextConfig(
                **{
                    **base.text_encoder.config.to_dict(),
                    "hidden_size": 24,
                    "num_attention_heads": 2,
                    "projection_dim": 24,
                }
            )
        ).eval()
        pipeline = FluxPipeline(
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            small_autoencoder(),
            clip,
            base.tokenizer,
            encoder,
            tokenizer,
            transformer,
        )
        return pipeline, {"guidance_scale": 3.5, "height": 32, "width": 16}
    if name == "pixart":
        encoder, tokenizer = small_t5(32)
        transformer = build(name, sample_size=128)  # the pipeline computes its default image size from it
        pipeline = PixArtAlphaPipeline(
            tokenizer, encoder, small_autoencoder(shift=None), transformer, DPMSolverMultistepScheduler()
        )
        return pipeline, {"guidance_scale": 3.0, "height": 32, "width": 16, "use_resolution_binning": False}
    if name == "sana15":
        options = {"guidance_scale": 3.0, "height": 64, "width": 32, "use_resolution_binning": False}
        return small_sana(build(name, sample_size=32)), options  # images of 64 x 64 pixels
    if name == "wan":
        return small_wan(transformer), {"guidance_scale": 3.0, "height": 32, "width": 16, "num_frames": 1}
    if name == "cogview4":
        return small_cogview4(transformer), {"guidance_scale": 3.0, "height": 32, "width": 16}
    flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=name.startswith("flux2"), shift=3.0)
    if name == "z_image":
        parts = (flow, small_autoencoder(), small_language_model(32, 2), small_chat_tokenizer(), transformer)
        return ZImagePipeline(*parts), {"guidance_scale": 3.0, "height": 32, "width": 16}
    if name == "flux2":
        encoder = small_language_model(8, 31, is_mistral=True)
        parts = (flow, small_normed_autoencoder(), encoder, small_chat_tokenizer(), transformer)
        return Flux2Pipeline(*parts), {"guidance_scale": 4.0, "height": 32, "width": 16}
    if name.startswith("flux2_klein"):
        parts = (flow, small_normed_autoencoder(), small_language_model(8, 28), small_chat_tokenizer())
        transformer = build("flux2", guidance_embeds=False)
        options = {"guidance_scale": 1.0, "height": 32, "width": 16}
        return Flux2KleinPipeline(*parts, transformer, is_distilled=name == "flux2_klein"), options
    torch.manual_seed(2)
    autoencoder = AutoencoderKLQwenImage(**VIDEOS, **MOMENTS).eval()
    pipeline = QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), autoencoder, None, None, transformer
    )
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    embeds = {"prompt_embeds": torch.randn(2, 5, 32, generator=generator), "prompt_embeds_mask": mask}
    return pipeline, {**embeds, "true_cfg_scale": 1.0, "height": 16, "width": 8}


def write(folder: Path, name: str, base: DiffusionPipeline) -> Path:
    """Save the pipeline of `make`; return the folder."""
    make(name, base)[0].save_pretrained(folder)
    return folder
