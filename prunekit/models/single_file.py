"""Load a single .safetensors file with a whole Stable Diffusion model, the form in which most fine-tunes are shared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError, infer_diffusers_model_type
from safetensors import SafetensorError, safe_open

from prunekit.models.hub import fetch_configs
from prunekit.models.names import check_index, loadable, local_path, read_object
from prunekit.runtime.errors import UserError, first_line

FAMILIES = {"v1": "sd-1.5", "v2": "sd-2.1", "xl_base": "sdxl"}  # diffusers' kind of a file: model with its configs
UNET_PREFIX, V_PREDICTION = "model.diffusion_model.", "v_pred"
UNET = f"{UNET_PREFIX}input_blocks.0.0.weight"
OTHERS = {"autoencoder": ("first_stage_model.",), "text encoder": ("cond_stage_model.", "conditioner.embedders.")}


def load_single_file(
    path: Path, config: str | Path | None, dtype: torch.dtype, say: Callable[[str], Any]
) -> DiffusionPipeline:
    """Load a file with the UNet, the autoencoder and the text encoders of Stable Diffusion 1.x, 2.x or XL.

    config: pipeline's directory or hub id with the configs and tokenizers; None: the model that `config_name` finds.
    say: function that takes a line for the user on which configs are used.
    Raises ValueError, one line: a file of another kind, or configs that do not fit it or cannot be fetched.
    """
    source, outline = config_name(path, config), _outline(path)
    for part, prefix in OTHERS.items():
        if not any(name.startswith(prefix) for name in outline):
            raise UserError(f"{path} holds no {part}; give a file with the whole model, or a pipeline's directory")
    if config is None:
        also = ", or single_file_config=sd-2.1-base if it predicts epsilon at 512 px" if source == "sd-2.1" else ""
        say(f"{path.name} is read with the configs of {source}; single_file_config=NAME selects others{also}")
    directory = local_path(source) or fetch_configs(source, f"the configs of {path.name}")
    if directory.is_file() or not (directory / "model_index.json").is_file():
        raise UserError(f"single_file_config={source}: no diffusers pipeline's directory")
    index = read_object(directory / "model_index.json")
    check_index(index, source)
    options: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    if index["_class_name"] == StableDiffusionPipeline.__name__:
        kind, options = StableDiffusionPipeline, {**options, "safety_checker": None, "requires_safety_checker": False}
    else:
        kind, options = StableDiffusionXLPipeline, {**options, "add_watermarker": False}
    try:
        pipeline = kind.from_single_file(
            str(path), config=str(directory), dtype=dtype, local_files_only=True, **options
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SingleFileComponentError) as error:
        raise UserError(f"{path} does not fit the configs of {source}: {first_line(error)}") from error
    if V_PREDICTION in outline and pipeline.scheduler.config.prediction_type != "v_prediction":
        raise UserError(
            f"{path} says that it predicts v, and the scheduler of {source} does not: set single_file_config to "
            "the directory of a pipeline whose scheduler has prediction_type v_prediction"
        )
    return pipeline


def config_name(path: Path, config: str | Path | None = None) -> str | Path:
    """Return the model whose configs fit a file: `config`, or by default a model derived from the file's tensors.

    Raises ValueError, one line, for a file that holds no supported model.
    """
    outline = _outline(path)
    if UNET not in outline:
        raise UserError(f"{path} does not hold a complete Stable Diffusion model (no tensor {UNET}); {loadable()}")
    if config is not None:
        return config
    kind = infer_diffusers_model_type(outline)
    if kind not in FAMILIES:
        raise UserError(f"{path} holds a model of the kind {kind!r}, which is not supported; {loadable()}")
    return FAMILIES[kind]


def check_size(path: Path, model: torch.nn.Module, source: str | Path) -> None:
    """Raise ValueError, one line, unless a file's UNet has as many weights as `model`, which is built from configs."""
    num_weights = sum(value.numel() for name, value in _outline(path).items() if name.startswith(UNET_PREFIX))
    expected = sum(parameter.numel() for parameter in model.parameters())
    if num_weights != expected:
        raise UserError(
            f"{path} does not fit the configs of {source}: its UNet has {num_weights:,} weights, not "
            f"{expected:,}; set single_file_config to the pipeline that it belongs to"
        )


def _outline(path: Path) -> dict[str, torch.Tensor]:
    """Return the file's tensors by name, on the meta device, without reading weights."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable .safetensors file: {first_line(error)}") from error
