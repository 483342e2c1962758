"""A PromptRoutedPipeline as one directory: base pipeline, experts, router and prompt encoder; safetensors and JSON.

    model_index.json  vae/ text_encoder/ tokenizer/ scheduler/ …   a diffusers pipeline without its UNet
    experts/0/ 1/ …                                               UNets, each in its own tier
    router.safetensors  prompt_encoder/                           who goes where
    routed.json                                                   what belongs together

Without prunekit, diffusers opens it with one expert: `DiffusionPipeline.from_pretrained(DIRECTORY, unet=EXPERT)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunekit.export.parts import Parts
from prunekit.export.staging import staged
from prunekit.export.tiers import save_unet
from prunekit.run_directory import ROUTER
from prunekit.serving.experts import Mixture
from prunekit.serving.loading import FORMAT, PROMPT_ENCODER, ROUTED
from prunekit.training.checkpoint import write_json


def save(parts: Parts, mixture: Mixture, directory: Path, tier: str = "auto") -> None:
    """Write a mixture and its pipeline's parts to a directory that is new or empty; it appears whole or not at all."""
    with staged(directory) as folder:
        write(parts, mixture, folder, tier)


def write(parts: Parts, mixture: Mixture, folder: Path, tier: str = "auto") -> list[dict[str, Any]]:
    """Write a mixture and its pipeline's parts into an existing folder; return the experts' specifications."""
    specifications = []
    for index in range(mixture.experts.num_experts):
        with mixture.experts.use(index) as unet:
            specifications.append(save_unet(unet, folder / "experts" / str(index), tier))
        del unet  # or it would stay in memory while the next one is loaded
    write_shared(parts, mixture, folder)
    return specifications


def write_shared(parts: Parts, mixture: Mixture, folder: Path) -> None:
    """Write all but the experts."""
    parts.save(folder)
    if mixture.router is not None and mixture.encoder is not None:
        mixture.router.save(folder / ROUTER)
        mixture.encoder.model.save(str(folder / PROMPT_ENCODER), create_model_card=False, safe_serialization=True)
    content = {
        "format": FORMAT,
        "num_experts": mixture.experts.num_experts,
        "has_router": mixture.router is not None,
        "guidance": mixture.guidance,
        "info": mixture.info,
    }
    write_json(folder / ROUTED, content)
