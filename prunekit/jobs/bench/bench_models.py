"""The models of a benchmark: a pipeline with a model's shapes and random weights, and its pruned denoisers."""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from prunekit.core.cost import CostModel
from prunekit.core.discovery import discover
from prunekit.core.registry import denoiser_of, is_denoiser
from prunekit.core.slicing import load_model
from prunekit.core.space import Architecture
from prunekit.jobs.bench.bench_recipe import ArchitectureConfig
from prunekit.methods import Random, select
from prunekit.models import load_pipeline, load_unet_on_meta
from prunekit.models.emoji_model import assemble, build_tokenizer
from prunekit.runtime.errors import UserError

TEXT_ENCODERS: dict[
    int, dict[str, Any]
] = {  # by the denoiser's text width: that of CLIP ViT-L/14, and that of OpenCLIP ViT-H/14 without a layer
    768: {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"},
    1024: {"num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"},
}
VOCABULARY, TOKENS = 49408, 77
AUTOENCODER: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
PROMPT = "a photograph of an astronaut riding a horse"
DEPTH_OF = {"random": "aptp", "width": "none", "depth": "all"}  # depth policy, by `choose` of an architecture


def random_unet(model: str, device: torch.device, dtype: torch.dtype, seed: int) -> ModelMixin:
    """Return a model's denoiser with random weights, frozen; nothing is fetched."""
    return _filled(load_unet_on_meta(model), device, dtype, seed)


def random_pipeline(model: ModelMixin, seed: int) -> DiffusionPipeline:
    """Return a Stable Diffusion 1 or 2 pipeline around a denoiser; the other parts have true sizes and random weights.

    Its tokenizer is trained on one prompt: which tokens are encoded does not change the time.
    Raises ValueError for a denoiser whose text encoder is not one of Stable Diffusion 1's or 2's.
    """
    denoiser = denoiser_of(model)
    width, pooled = denoiser.text_width(model), denoiser.pooled_width(model)
    if width not in TEXT_ENCODERS or pooled:
        raise UserError(
            f"no text encoder is known for a model with text of width {width} and pooled text of width "
            f"{pooled}; time only its calls (workload: unet), or give the directory of a pipeline and "
            "weights=own"
        )
    tokenizer = build_tokenizer([PROMPT], VOCABULARY)
    tokenizer.model_max_length = TOKENS
    levels = len(AUTOENCODER["block_out_channels"])
    with torch.device("meta"):
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                intermediate_size=4 * width,
                projection_dim=width,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **TEXT_ENCODERS[width],
            )
        )
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            sample_size=768,
            **AUTOENCODER,
        )
    autoencoder, text_encoder = (_filled(part, model.device, model.dtype, seed) for part in (autoencoder, text_encoder))
    return assemble(autoencoder, text_encoder, tokenizer, model)


def own_pipeline(model: str, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """Return a model's pipeline with its own weights, frozen."""
    pipeline = load_pipeline(model, dtype).to(device)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return pipeline


def choose(config: ArchitectureConfig, model: ModelMixin, latent: int, text_length: int, seed: int) -> Any:
    """Return (architecture, cost model) for a budget, from the model's shapes, the settings and the seed alone.

    Scores are those of the method Random. With choose=depth, widths score above all depths and are cut last.
    """
    method = Random(seed=seed, depth=DEPTH_OF[config.choose])
    scores = method.score(model)
    if config.choose == "depth":
        scores.values[: scores.space.num_width] += 1
    cost = CostModel(model, scores.space, latent, text_length)
    assert config.budget is not None
    return select(scores, cost, config.budget, config.align), cost


def read_unet(path: str, device: torch.device, dtype: torch.dtype) -> ModelMixin:
    """Return the denoiser of a folder, frozen; raise a one-line ValueError if there is none."""
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} holds no denoiser: give a folder that save_pretrained wrote (it has a config.json)")
    unet = load_model(path, torch_dtype=dtype).to(device)
    return unet.eval().requires_grad_(False)


def dense_cost(model: ModelMixin, latent: int, text_length: int) -> tuple[int, int]:
    """Return (exact MACs, parameters) of a denoiser as it is, batch 1."""
    cost = CostModel(model, discover(model, "none"), latent, text_length)
    return cost.dense_macs, cost.dense_params


def kept_units(architecture: Architecture) -> dict[str, list[int]]:
    """Return [kept, total] units of each kind; units under a removed layer count as removed."""
    kept: dict[str, list[int]] = {}
    for row in architecture.describe():
        pair = kept.setdefault(row["kind"], [0, 0])
        pair[0] += 0 if row["removed"] else int(row["kept"])
        pair[1] += row["total"]
    return kept


@torch.no_grad()
def _filled(module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Return a meta module on a device, with random weights that keep activations near 1, and with its tables."""
    if is_denoiser(module):
        denoiser_of(module).fill_tables(module)
    blank = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    module = nn.Module.to(module, dtype)  # diffusers' own `to` warns about a change of dtype
    module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:  # a bias, or the weight of a norm
            parameter.fill_(float(name.endswith("weight")))
        else:
            bound = math.sqrt(3 / max(1, parameter[0].numel()))
            parameter.uniform_(-bound, bound, generator=generator)
    for name in blank:
        if not name.endswith("position_ids"):
            raise UserError(f"{type(module).__name__} has a buffer {name!r}, which random weights cannot fill")
        buffer = module.get_buffer(name)
        buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
    return module.eval().requires_grad_(False)
