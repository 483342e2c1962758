"""Load a model's pipeline with its weights, in float32 by default, and check that it is supported."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from prunekit.core.registry import denoiser_in, denoiser_named, denoiser_of, family_of, pipeline_parts
from prunekit.models.hub import INDEX, fetch
from prunekit.models.lora import LoraWeights, merge_lora
from prunekit.models.names import LOCAL, check_index, loadable, local_path, read_object
from prunekit.models.shapes import check_sizes, unet_from_config
from prunekit.models.single_file import load_single_file
from prunekit.models.weights import WITHOUT, variant_of, weight_names
from prunekit.runtime.errors import UserError, first_line

OPTIONS = {  # constructor arguments, so that no watermark or filter changes the compared pictures
    "StableDiffusionPipeline": {"requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
SETTINGS = ("force_zeros_for_empty_prompt", "is_distilled")  # config values of a pipeline that its pictures depend on
logger = logging.getLogger(__name__)


def quiet_libraries() -> None:
    """Switch off the progress bars and notices of diffusers and transformers; prunekit shows its own."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    hub_logging.set_verbosity_error()


def load_pipeline(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    lora: Iterable[LoraWeights | Mapping[str, Any]] = (),
    single_file_config: str | Path | None = None,
    say: Callable[[str], Any] = logger.warning,
) -> DiffusionPipeline:
    """Load a text-to-image pipeline with its weights, on the CPU, in evaluation mode, without a safety checker.

    Args:
        name: "emoji" or "emoji-sd3" (the embedded models), a diffusers directory (with a stock or a pruned denoiser), a
            .safetensors file with a whole model, a hub id, or a short name in `KNOWN`.
        dtype: dtype of all weights, independent of the dtype in the files; training needs float32.
        lora: LoRAs to merge into the weights, in this order.
        single_file_config: only for a single file: directory or hub id of the pipeline whose configs and tokenizers are
            used; by default it is derived from the tensors of the file.
        say: function that takes lines for the user: files that exist only in half precision, the configs of a single
            file, and the number of layers that a LoRA changed.

    Raises:
        ValueError: one line: no such model, a model that cannot be fetched, or one that is not supported.
        ImportError: LoRA weights without peft.

    """
    quiet_libraries()
    path = local_path(name)
    if path is not None and path.is_file():
        pipeline = load_single_file(path, single_file_config, dtype, say)
    elif single_file_config is not None:
        raise UserError(
            f"single_file_config={single_file_config} is for a model in a single file, and {name} is not a single file"
        )
    else:
        pipeline = load_directory(path or fetch(name, unet_from_config), name, dtype, say)
    _check(pipeline, name)
    merge_lora(pipeline, lora, say)
    pipeline.set_progress_bar_config(disable=True)
    return freeze(pipeline)


def load_pipeline_of(settings: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load the pipeline that a run pruned, from its recipe's settings: model, lora, single_file_config."""
    lora, configs = settings.get("lora") or (), settings.get("single_file_config")
    return load_pipeline(settings["model"], dtype, lora=lora, single_file_config=configs)


def load_directory(
    directory: Path,
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], Any] = logger.warning,
    with_denoiser: bool = True,
    kind: str | None = None,
) -> DiffusionPipeline:
    """Load a diffusers pipeline's directory, only from safetensors; prunekit's class loads a pruned denoiser.

    No code from the directory is run. name: the model's name in errors. with_denoiser: if false, the pipeline's
    denoiser is None, and its files may be missing. kind: name of the pipeline's class; by default the name in its
    `model_index.json`.
    Raises ValueError, one line, for a directory that is not a pipeline's, or does not load.
    """
    if not (directory / INDEX).is_file():
        raise UserError(f"{directory} is not a diffusers pipeline: it has no {INDEX}")
    index = {**read_object(directory / INDEX), **({} if kind is None else {"_class_name": kind})}
    part = pipeline_parts().get(str(index.get("_class_name")), "unet")
    check_index(index if with_denoiser else {**index, part: ["left out"]}, name)
    if with_denoiser and (config := directory / part / "config.json").is_file():
        check_sizes(read_object(config), name)
    is_pruned = with_denoiser and str(index[part][-1]).startswith("Pruned")
    left_out = WITHOUT if with_denoiser and not is_pruned else (*WITHOUT, part)
    made = getattr(diffusers, index["_class_name"])
    options = {name: None for name in left_out if name in (*index, part)}
    plain = OPTIONS.get(made.__name__, {})
    weights: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    try:
        names = weight_names(directory)
        variant = variant_of(names if with_denoiser else [one for one in names if not one.startswith(f"{part}/")])
        if variant is not None:
            say(f"{name} has only {variant} weights; they are read as {str(dtype).removeprefix('torch.')}")
            weights["variant"] = variant
        pipeline = made.from_pretrained(directory, **weights, **plain, **options)
        if is_pruned:  # added afterwards, because diffusers would require trust_remote_code
            pruned: Any = denoiser_named(index[part][-1]).pruned_class()
            model = pruned.from_pretrained(directory / part, **weights)
            settings = {key: value for key, value in pipeline.config.items() if key in SETTINGS}
            pipeline = made(**{**pipeline.components, part: model}, **plain, **settings)
        return pipeline
    except Exception as error:  # damaged files make libraries raise almost anything
        raise UserError(f"cannot load model {str(name)!r}: {first_line(error)}. Give {LOCAL}") from error


def freeze(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Switch a pipeline's parts to evaluation mode and freeze their weights, in place; return the pipeline."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def _check(pipeline: DiffusionPipeline, name: str | Path) -> None:
    """Raise ValueError, one line, if a pipeline is not supported or lacks weights."""
    if type(pipeline).__name__ not in pipeline_parts():
        raise UserError(f"{type(pipeline).__name__} of {name} is not supported; {loadable()}")
    model = denoiser_in(pipeline)
    denoiser_of(model).check(model)
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module) and any(parameter.is_meta for parameter in module.parameters()):
            raise UserError(f"the files of {name} lack weights of its {part}")
    if (reason := family_of(pipeline).refusal(pipeline)) is not None:
        raise UserError(f"{name} has {reason}; {loadable()}")
