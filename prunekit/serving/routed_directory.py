"""Save a PromptRoutedPipeline as one directory; load one from such a directory, a run, or any diffusers pipeline.

The directory holds:

    model_index.json  vae/ text_encoder/ tokenizer/ scheduler/ …   a diffusers pipeline without its denoiser
    experts/0/ 1/ …                                               denoisers, each in its own tier
    router.safetensors  prompt_encoder/                           the router that assigns prompts to experts
    routed.json                                                   number of experts, class of the pipeline, guidance …
    pipeline.py  experts/mixture.py                               the mixture as one pipeline of diffusers

Without prunekit, diffusers opens the directory through the last two files. A stock class opens it with one expert as
the denoiser: `StableDiffusionPipeline.from_pretrained(DIRECTORY, unet=EXPERT)`. prunekit itself runs neither file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from prunekit.core.registry import latent_size
from prunekit.core.timesteps import read_bins
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.prompt_encoder import PromptEncoder, load_prompt_encoder
from prunekit.export.model_folder import load_denoiser, num_weights
from prunekit.export.pipeline_parts import Parts
from prunekit.export.tiers import save_expert
from prunekit.methods.result import PruneResult
from prunekit.methods.router import Router
from prunekit.models import load_pipeline_of
from prunekit.models.hub import INDEX
from prunekit.models.names import read_object
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import staged, write_json
from prunekit.runtime.run_directory import RECIPE, ROUTER, method_directory, read_recipe
from prunekit.serving.experts import Experts, Mixture
from prunekit.serving.experts_folder import PROMPT_ENCODER, ROUTED, read_mixture, read_router
from prunekit.serving.standalone import write_own_code

FORMAT = 2  # has the pipeline's class and the latent's size; in format 1, model_index.json names a stock class


def load(
    directory: Path,
    method: str | None,
    device: str | torch.device | None,
    dtype: torch.dtype,
    max_resident: int | None,
    max_bytes: int | None,
) -> tuple[Parts, Mixture]:
    """Read a pipeline's parts and its experts; arguments and errors as `PromptRoutedPipeline.from_pretrained`."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bounds = {"max_resident": max_resident, "max_bytes": max_bytes}
    kind = _kind(directory)
    if kind == RECIPE:
        parts, mixture = _from_run(directory, method, place, dtype, bounds)
    elif kind == ROUTED:
        parts, mixture = _from_routed(directory, place, dtype, bounds)
    else:
        parts = Parts.load(directory, dtype)
        mixture = Mixture(_experts(lambda index: directory / parts.denoiser, 1, place, dtype, bounds))
    for part in parts.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(place)
    return parts, mixture


def load_router(directory: Path, method: str | None) -> tuple[Router | None, PromptEncoder | None]:
    """Read only the router and its prompt encoder; (None, None) for a single expert. Arguments and errors as `load`."""
    kind = _kind(directory)
    if kind == RECIPE:
        result = PruneResult.load(method_directory(directory, method))
        return _router_of_run(result, read_recipe(directory))
    return read_router(directory, _read_routed(directory)[0]) if kind == ROUTED else (None, None)


def _kind(directory: Path) -> str:
    """Return the name of the file that tells a directory's kind: RECIPE, ROUTED or INDEX; FileNotFoundError if none."""
    for name in (RECIPE, ROUTED, INDEX):
        if (directory / name).is_file():
            return name
    raise FileNotFoundError(
        f"{directory} is neither a run directory nor a pipeline: it has none of {RECIPE}, {ROUTED} and {INDEX}"
    )


def recipe_hash(directory: Path) -> str:
    """Return the hash of a run's recipe, which identifies the run in pictures and exports."""
    return Fingerprint((directory / RECIPE).read_text(encoding="utf-8")).key()


def _from_run(
    directory: Path, method: str | None, device: torch.device, dtype: torch.dtype, bounds: Mapping[str, int | None]
) -> tuple[Parts, Mixture]:
    settings, folder = read_recipe(directory), method_directory(directory, method)
    method = folder.name
    result = PruneResult.load(folder)
    parts = Parts.of(load_pipeline_of(settings, dtype))

    def place_of(index: int) -> Path:
        expert = folder / "experts" / str(index) / parts.denoiser
        if not expert.is_dir():
            raise FileNotFoundError(f"expert {index} of {method} does not exist yet ({expert}); resume the run")
        return expert

    experts = _experts(place_of, result.num_experts, device, dtype, bounds)
    router, encoder = _router_of_run(result, settings)
    info = {
        "recipe": recipe_hash(directory),
        "method": method,
        "model": settings["model"],
        "result": result.info.to_dict(),
    }
    return parts, Mixture(experts, router, encoder, settings["evaluation"]["guidance"], info)


def _router_of_run(result: PruneResult, settings: dict[str, Any]) -> tuple[Router | None, PromptEncoder | None]:
    return result.router, None if result.router is None else load_prompt_encoder(settings["prompt_encoder"])


def _from_routed(
    directory: Path, device: torch.device, dtype: torch.dtype, bounds: Mapping[str, int | None]
) -> tuple[Parts, Mixture]:
    content, count = _read_routed(directory)
    experts = _experts(lambda index: directory / "experts" / str(index), count, device, dtype, bounds)
    mixture = read_mixture(directory, content, experts)
    return Parts.load(directory, dtype, content.get("pipeline")), mixture


def _read_routed(directory: Path) -> tuple[dict[str, Any], int]:
    """Return the content of `routed.json` and the number of experts; UserError if an expert's folder is missing."""
    content = read_object(directory / ROUTED)
    if content.get("format") not in (1, FORMAT):
        raise UserError(
            f"{directory / ROUTED} has format {content.get('format')!r}; this version of prunekit reads formats 1 and "
            f"{FORMAT}: use the version that wrote it, or a newer one"
        )
    count = content.get("num_experts")
    if not isinstance(count, int) or not all((directory / "experts" / str(index)).is_dir() for index in range(count)):
        raise UserError(f"{directory} lacks experts: {ROUTED} says {count!r}; copy or export it again")
    return content, count


def _experts(
    place_of: Callable[[int], Path],
    count: int,
    device: torch.device,
    dtype: torch.dtype,
    bounds: Mapping[str, int | None],
) -> Experts:
    def read(index: int, device: torch.device, dtype: torch.dtype) -> ModelMixin:
        return load_denoiser(place_of(index), dtype, device)

    return Experts(read, lambda index: num_weights(place_of(index)), count, device, dtype, **bounds)


def save(parts: Parts, mixture: Mixture, directory: Path, tier: str = "auto") -> None:
    """Write a mixture and its pipeline's parts to a directory that is new or empty; it appears whole or not at all."""
    with staged(directory) as folder:
        write(parts, mixture, folder, tier)


def write(parts: Parts, mixture: Mixture, folder: Path, tier: str = "auto") -> list[dict[str, Any]]:
    """Write a mixture and its pipeline's parts into an existing folder; return the specifications of its experts."""
    specifications = []
    for index in range(mixture.experts.num_experts):
        with mixture.experts.use(index) as model:
            specifications += save_expert(model, folder / "experts" / str(index), tier)
        del model  # or it would stay in memory while the next one is loaded
    write_shared(parts, mixture, folder)
    return specifications


def write_shared(parts: Parts, mixture: Mixture, folder: Path) -> bool:
    """Write all files but the experts, which are in the folder; return whether diffusers can open it as one pipeline.

    Diffusers cannot if an expert consists of several slices for bins of timesteps: only prunekit selects a slice.
    """
    parts.save(folder)
    if mixture.router is not None and mixture.encoder is not None:
        mixture.router.save(folder / ROUTER)
        mixture.encoder.model.save(str(folder / PROMPT_ENCODER), create_model_card=False, safe_serialization=True)
    folders = [folder / "experts" / str(index) for index in range(mixture.experts.num_experts)]
    is_one_pipeline = all(read_bins(place) is None for place in folders)
    if is_one_pipeline:
        write_own_code(parts, folder)
    with mixture.experts.use(0) as model:
        size = latent_size(model)
    content = {
        "format": FORMAT,
        "pipeline": parts.kind.__name__,
        "latent_size": size,
        "num_experts": mixture.experts.num_experts,
        "has_router": mixture.router is not None,
        "guidance": mixture.guidance,
        "info": mixture.info,
    }
    write_json(folder / ROUTED, content)
    return is_one_pipeline
