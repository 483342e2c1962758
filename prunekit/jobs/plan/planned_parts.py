"""A pipeline's parts other than the denoiser (autoencoder, text encoders, scheduler), from configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ModelMixin,
)
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunekit.core.registry import denoiser_of
from prunekit.core.timesteps import sampled_timesteps
from prunekit.jobs.plan.text_encoders import (
    CLIP_L,
    CLIP_L_PROJECTED,
    GEMMA_2_2B,
    MISTRAL_SMALL_24B,
    OPEN_CLIP_G,
    OPEN_CLIP_H,
    QWEN_2_5_VL_7B,
    QWEN_3_4B,
    QWEN_3_8B,
    T5_XXL,
    UMT5_XXL,
    TextEncoderShape,
    shape_of,
)
from prunekit.models.names import hub_id, local_path, read_object, short_name
from prunekit.models.single_file import config_name
from prunekit.runtime.errors import UserError, first_line

T5_TOKENS = 256  # tokens per text in the pipeline of Stable Diffusion 3
T5_XXL_256, T5_XXL_300 = replace(T5_XXL, tokens=T5_TOKENS), replace(T5_XXL, tokens=300)
AUTOENCODER = {  # of Stable Diffusion 1, 2 and XL, and PixArt
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
AUTOENCODER_16 = {**AUTOENCODER, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
VIDEO_AUTOENCODER = {"_class_name": "AutoencoderKLQwenImage", "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]}
NORMED_AUTOENCODER = {**AUTOENCODER, "_class_name": "AutoencoderKLFlux2", "latent_channels": 32, "sample_size": 1024}
WAN_AUTOENCODER = {**VIDEO_AUTOENCODER, "_class_name": "AutoencoderKLWan"}
BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
DEEP_AUTOENCODER = {  # of Sana
    "_class_name": "AutoencoderDC",
    "latent_channels": 32,
    "encoder_block_types": BLOCKS,
    "decoder_block_types": BLOCKS,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
DDIM = {"_class_name": "DDIMScheduler", "steps_offset": 1}
EULER = {"_class_name": "EulerDiscreteScheduler", "steps_offset": 1}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SANA = ((GEMMA_2_2B,), DEEP_AUTOENCODER, {"_class_name": "DPMSolverMultistepScheduler", **FLOW_SIGMAS})
WAN = ((UMT5_XXL,), WAN_AUTOENCODER, {"_class_name": "UniPCMultistepScheduler", **FLOW_SIGMAS})
SD3 = ((CLIP_L_PROJECTED, OPEN_CLIP_G, T5_XXL_256), AUTOENCODER_16, {**FLOW, "shift": 3.0})
FLUX2 = (NORMED_AUTOENCODER, {**FLOW, "shift": 3.0, "use_dynamic_shifting": True})
KLEIN_4B, KLEIN_9B = (replace(encoder, has_scores=True) for encoder in (QWEN_3_4B, QWEN_3_8B))


class Known(NamedTuple):
    """The parts of a known model other than its denoiser."""

    text_encoders: tuple[TextEncoderShape, ...]
    autoencoder: dict[str, Any]
    scheduler: dict[str, Any]


KNOWN = {  # by the short names of `prunekit.models.KNOWN`
    "sd-1.4": Known((CLIP_L,), AUTOENCODER, PNDM),
    "sd-1.5": Known((CLIP_L,), AUTOENCODER, PNDM),
    "sd-2.1": Known((OPEN_CLIP_H,), AUTOENCODER, DDIM),
    "sd-2.1-base": Known((OPEN_CLIP_H,), AUTOENCODER, PNDM),
    "sdxl": Known((CLIP_L, OPEN_CLIP_G), AUTOENCODER, EULER),
    "sd-3-medium": Known(*SD3),
    "sd-3.5-medium": Known(*SD3),
    "sd-3.5-large": Known(*SD3),
    "flux.1-dev": Known((CLIP_L, T5_XXL), AUTOENCODER_16, {**FLOW, "shift": 3.0, "use_dynamic_shifting": True}),
    "flux.1-schnell": Known((CLIP_L, T5_XXL_256), AUTOENCODER_16, FLOW),
    "qwen-image": Known((QWEN_2_5_VL_7B,), VIDEO_AUTOENCODER, {**FLOW, "use_dynamic_shifting": True}),
    "pixart-sigma": Known((T5_XXL_300,), AUTOENCODER, {"_class_name": "DPMSolverMultistepScheduler"}),
    "flux.2-dev": Known((MISTRAL_SMALL_24B,), *FLUX2),
    "flux.2-klein-4b": Known((KLEIN_4B,), *FLUX2),
    "flux.2-klein-9b": Known((KLEIN_9B,), *FLUX2),
    "flux.2-klein-base-4b": Known((KLEIN_4B,), *FLUX2),
    "flux.2-klein-base-9b": Known((KLEIN_9B,), *FLUX2),
    "z-image": Known((QWEN_3_4B,), AUTOENCODER_16, {**FLOW, "shift": 6.0}),
    "z-image-turbo": Known((QWEN_3_4B,), AUTOENCODER_16, {**FLOW, "shift": 3.0}),
    "sana-1.6b": Known(*SANA),
    "sana-1.5-1.6b": Known(*SANA),
    "sana-1.5-4.8b": Known(*SANA),
    "wan-2.1-1.3b": Known(*WAN),
    "wan-2.1-14b": Known(*WAN),
}
# The known model whose parts a UNet without configs of its parts is assumed to have, by the UNet's text width
FAMILIES = {768: "sd-1.5", 1024: "sd-2.1", 2048: "sdxl"}
TRANSFORMERS = {  # the same for a transformer, by its class
    "SD3Transformer2DModel": "sd-3.5-medium",
    "FluxTransformer2DModel": "flux.1-dev",
    "QwenImageTransformer2DModel": "qwen-image",
    "PixArtTransformer2DModel": "pixart-sigma",
    "Flux2Transformer2DModel": "flux.2-dev",
    "ZImageTransformer2DModel": "z-image-turbo",
    "SanaTransformer2DModel": "sana-1.5-1.6b",
    "WanTransformer3DModel": "wan-2.1-1.3b",
}


VIDEO_AUTOENCODERS: dict[Any, Any] = {kind.__name__: kind for kind in (AutoencoderKLQwenImage, AutoencoderKLWan)}


class PictureAutoencoder(nn.Module):
    """A video autoencoder (Qwen-Image, Wan) for pictures as one-frame videos, with `AutoencoderKL`'s config names."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.model = VIDEO_AUTOENCODERS[config["_class_name"]].from_config(dict(config))
        widths = [self.model.config.base_dim * factor for factor in self.model.config.dim_mult]
        names = {"latent_channels": self.model.config.z_dim, "block_out_channels": widths}
        names["_class_name"] = config["_class_name"]
        self.config = FrozenDict({**self.model.config, **names})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PictureAutoencoder:
        """Build it from a video autoencoder's config, which names the class."""
        return cls(config)

    def encode(self, pixels: Tensor) -> Any:
        """Encode pictures (n, 3, H, W); return the posterior of their latents."""
        return self.model.encode(pixels.unsqueeze(2))

    def decode(self, latents: Tensor) -> Any:
        """Decode latents (n, C, h, w); return the pictures as one-frame videos."""
        return self.model.decode(latents.unsqueeze(2))


AnyAutoencoder: TypeAlias = AutoencoderKL | AutoencoderKLFlux2 | AutoencoderDC | PictureAutoencoder


@dataclass(frozen=True)
class Parts:
    """A pipeline's parts other than the denoiser; the autoencoder is on the meta device."""

    autoencoder: AnyAutoencoder
    text_encoders: tuple[TextEncoderShape, ...]
    scheduler: Any

    @property
    def params(self) -> int:
        """Number of parameters of the autoencoder and the text encoders."""
        return sum(p.numel() for p in self.autoencoder.parameters()) + sum(e.params for e in self.text_encoders)

    @property
    def caption_macs(self) -> int:
        """Multiply-adds of encoding one caption for the denoiser."""
        return sum(encoder.macs for encoder in self.text_encoders)

    @cached_property
    def scale(self) -> int:
        """Pixels per latent position."""
        config = self.autoencoder.config
        widths = config.get("block_out_channels") or config["encoder_block_out_channels"]
        return 2 ** (len(widths) - 1)

    def calls(self, steps: int, texts: int) -> int:
        """Return the denoiser calls per picture, one per step and text; some schedulers add steps to `steps`."""
        return len(sampled_timesteps(self.scheduler, steps)) * texts

    def picture_macs(self, latent: tuple[int, int]) -> tuple[int, int]:
        """Return the MACs of encoding and of decoding one picture with a latent (h, w)."""
        height, width = latent
        channels = self.autoencoder.config.latent_channels
        pixels = torch.zeros(1, 3, height * self.scale, width * self.scale, device="meta")
        values = torch.zeros(1, channels, height, width, device="meta")
        counts = []
        for function, argument in ((self.autoencoder.encode, pixels), (self.autoencoder.decode, values)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                function(argument)
            counts.append(counter.get_total_flops() // 2)
        return counts[0], counts[1]


def load_parts(name: str | Path, model: ModelMixin, single_file_config: str | Path | None = None) -> Parts:
    """Return the parts of a model, named as in `load_shape`; a part without a config is taken from a known model.

    Nothing is fetched: the configs are those of the directory or of the local hub cache. Raises UserError for configs
    from which the parts cannot be built.
    """
    source, path = name, local_path(name)
    if path is not None and path.is_file():
        source = config_name(path, single_file_config)
    try:
        return _parts(source, model)
    except UserError:
        raise
    except Exception as error:  # damaged configs make constructors raise almost anything
        what = "autoencoder, text encoders and scheduler"
        raise UserError(f"the configs of {name} build no {what}: {first_line(error)}") from error


def _parts(source: str | Path, model: ModelMixin) -> Parts:
    known = KNOWN[_known_name(source, model)]
    configs = [_config(source, f"{part}/config.json") for part in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    limit = _config(source, "tokenizer_3/tokenizer_config.json") or {}
    tokens = min(int(limit.get("model_max_length", T5_TOKENS)), T5_TOKENS)
    read = [shape_of(config, tokens) for config in configs if config]
    with torch.device("meta"):
        autoencoder = _autoencoder(_config(source, "vae/config.json") or known.autoencoder)
    scheduler = build_scheduler(_config(source, "scheduler/scheduler_config.json") or known.scheduler)
    return Parts(autoencoder, tuple(read or known.text_encoders), scheduler)


def _known_name(source: str | Path, model: ModelMixin) -> str:
    """Return the short name of the known model that supplies the parts whose configs are missing."""
    denoiser = denoiser_of(model)
    by_width = FAMILIES.get(denoiser.text_width(model), "sd-1.5")
    kind = denoiser.pruned_class().__name__.removeprefix("Pruned")
    return short_name(source) or TRANSFORMERS.get(kind, by_width)


def _autoencoder(config: Mapping[str, Any]) -> AnyAutoencoder:
    named = str(config.get("_class_name"))
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (AutoencoderDC, AutoencoderKLFlux2)}
    kind = PictureAutoencoder if named in VIDEO_AUTOENCODERS else kinds.get(named, AutoencoderKL)
    return kind.from_config(config).eval()


def build_scheduler(config: dict[str, Any]) -> Any:
    """Build the scheduler of a config, with its betas on the CPU."""
    kind = getattr(diffusers, config["_class_name"])
    return kind.from_config({key: value for key, value in config.items() if key != "_class_name"})


def _config(source: str | Path, file: str) -> dict[str, Any] | None:
    directory = local_path(source)
    if directory is not None:
        return read_object(directory / file) if (directory / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id(source), file)
    return read_object(Path(cached)) if isinstance(cached, str) else None
