"""The folder of an exported mixture: experts, router and prompt encoder, for a pipeline without prunekit.

An export's `experts/mixture.py` is generated from this module and the definitions that it needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, ModelMixin

from prunekit.data.prompt_encoder import PromptEncoder
from prunekit.methods.router import Router
from prunekit.runtime.errors import UserError
from prunekit.runtime.run_directory import ROUTER
from prunekit.serving.experts import DEFAULT_GUIDANCE, Experts, Mixture

ROUTED = "routed.json"  # settings of a saved PromptRoutedPipeline
PROMPT_ENCODER = "prompt_encoder"


def read_router(directory: Path, content: dict[str, Any]) -> tuple[Router | None, PromptEncoder | None]:
    """Read the router and the prompt encoder of a mixture's directory; return (None, None) if it has no router.

    content: content of the directory's `routed.json`.

    Raises:
        UserError: the router does not fit the prompt encoder or the number of experts.

    """
    if not content.get("has_router"):
        return None, None
    router, encoder = Router.load(directory / ROUTER), PromptEncoder(directory / PROMPT_ENCODER)
    num_experts = content["num_experts"]
    if (router.num_experts, router.embedding_size) != (num_experts, encoder.size):
        raise UserError(
            f"the router in {directory} has {router.num_experts} experts and takes {router.embedding_size} values "
            f"of a prompt; there are {num_experts} experts, and the prompt encoder gives {encoder.size}"
        )
    return router, encoder


def read_mixture(directory: Path, content: dict[str, Any], experts: Experts) -> Mixture:
    """Return a directory's experts with their router; arguments and errors as `read_router`."""
    router, encoder = read_router(directory, content)
    guidance = float(content.get("guidance", DEFAULT_GUIDANCE))
    return Mixture(experts, router, encoder, guidance, dict(content.get("info") or {}))


class ExpertsFolder:
    """The component `experts` of an exported pipeline: the folder of experts, each of which is read when it is used."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.content: dict[str, Any] = json.loads((folder.parent / ROUTED).read_text(encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> ExpertsFolder:
        """Open the folder `experts` of an export; `options` are ignored."""
        return cls(Path(folder))

    @property
    def latent_size(self) -> tuple[int, int]:
        """The latent's (h, w) that the experts were made for."""
        height, width = self.content["latent_size"]
        return height, width

    def mixture(self, device: torch.device, dtype: torch.dtype, max_resident: int | None) -> Mixture:
        """Return the mixture, whose experts are loaded on a device and in a dtype when they are used.

        max_resident: largest number of experts in memory; None: all.
        """
        count: int = self.content["num_experts"]
        experts = Experts(self._load, _no_size, count, device, dtype, max_resident)
        return read_mixture(self.folder.parent, self.content, experts)

    def _load(self, index: int, device: torch.device, dtype: torch.dtype) -> ModelMixin:
        place = self.folder / str(index)
        own_class = "auto_map" in json.loads((place / "config.json").read_text(encoding="utf-8"))
        model = AutoModel.from_pretrained(str(place), trust_remote_code=own_class)
        torch.nn.Module.to(model, device=device, dtype=dtype)  # all weights; diffusers' own `to` warns about some
        return model.eval().requires_grad_(False)


def _no_size(index: int) -> int:
    raise AssertionError("only a bound on bytes needs sizes")
