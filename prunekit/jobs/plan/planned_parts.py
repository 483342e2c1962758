"""What a pipeline has beside its denoiser, from configs alone: autoencoder, text encoders, scheduler."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from prunekit.core.registry import denoiser_of
from prunekit.models.names import hub_id, local_path, read_object, short_name
from prunekit.models.single_file import config_name
from prunekit.runtime.errors import UserError, first_line


@dataclass(frozen=True)
class TextEncoderShape:
    """The sizes of a CLIP text encoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    projection_dim: int = 0  # of a pooled output; 0: none

    @property
    def params(self) -> int:
        """The number of weights and biases."""
        width, inner = self.hidden_size, self.intermediate_size
        layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
        embeddings = (self.vocab_size + self.max_position_embeddings) * width
        return embeddings + self.num_hidden_layers * layer + 2 * width + self.projection_dim * width

    @property
    def macs(self) -> int:
        """Multiply-adds of one caption, padded to the full length."""
        tokens, width = self.max_position_embeddings, self.hidden_size
        layer = tokens * (4 * width * width + 2 * width * self.intermediate_size) + 2 * tokens * tokens * width
        return self.num_hidden_layers * layer + self.projection_dim * width


CLIP_L = TextEncoderShape(768, 3072, 12)
OPEN_CLIP_H = TextEncoderShape(1024, 4096, 23)
OPEN_CLIP_G = TextEncoderShape(1280, 5120, 32, projection_dim=1280)
AUTOENCODER = {  # of every known model
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
KNOWN: dict[str, tuple[list[TextEncoderShape], dict[str, Any]]] = {  # by the short names of `prunekit.models.KNOWN`
    "sd-1.4": ([CLIP_L], PNDM),
    "sd-1.5": ([CLIP_L], PNDM),
    "sd-2.1": ([OPEN_CLIP_H], {"_class_name": "DDIMScheduler", "steps_offset": 1}),
    "sd-2.1-base": ([OPEN_CLIP_H], PNDM),
    "sdxl": ([CLIP_L, OPEN_CLIP_G], {"_class_name": "EulerDiscreteScheduler", "steps_offset": 1}),
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
FAMILIES = {768: "sd-1.5", 1024: "sd-2.1", 2048: "sdxl"}  # whose parts a UNet alone is taken to have, by its text width


@dataclass(frozen=True)
class Parts:
    """A pipeline's parts beside the UNet; the autoencoder is on the meta device."""

    autoencoder: AutoencoderKL
    text_encoders: tuple[TextEncoderShape, ...]
    scheduler: Any

    @property
    def params(self) -> int:
        """Weights of the autoencoder and the text encoders."""
        return sum(p.numel() for p in self.autoencoder.parameters()) + sum(e.params for e in self.text_encoders)

    @property
    def caption_macs(self) -> int:
        """Multiply-adds of encoding one caption for the UNet."""
        return sum(encoder.macs for encoder in self.text_encoders)

    @cached_property
    def scale(self) -> int:
        """Pixels per latent position."""
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    def calls(self, steps: int, texts: int) -> int:
        """Denoiser calls of one picture, one a step for each text; some schedulers make more steps than asked for."""
        self.scheduler.set_timesteps(steps)
        return len(self.scheduler.timesteps) * texts

    def picture_macs(self, latent: tuple[int, int]) -> tuple[int, int]:
        """Multiply-adds of encoding and of decoding one picture, by its latent (h, w)."""
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
    """Return the parts of a model, named as in `load_shape`; what has no config here is taken from its family.

    Nothing is fetched: a directory's configs are read, or those of the local hub cache. Raises UserError for configs
    that build nothing.
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
    family = short_name(source) or FAMILIES.get(denoiser_of(model).text_width(model), "sd-1.5")
    encoders, scheduler = KNOWN[family]
    configs = [_config(source, f"{part}/config.json") for part in ("text_encoder", "text_encoder_2")]
    read = [TextEncoderShape(**{k: v for k, v in config.items() if k in SIZES}) for config in configs if config]
    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(_config(source, "vae/config.json") or AUTOENCODER).eval()
    return Parts(
        autoencoder,
        tuple(read or encoders),
        build_scheduler(_config(source, "scheduler/scheduler_config.json") or scheduler),
    )


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
