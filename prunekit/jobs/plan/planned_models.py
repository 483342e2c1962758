"""The models of planned recipes: shapes and costs are computed once for all recipes that share a model."""

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

import torch

from prunekit.core.cost import CostModel
from prunekit.core.discovery import discover
from prunekit.core.space import UnitSpace
from prunekit.jobs.plan.planned_parts import Parts, load_parts
from prunekit.jobs.plan.rehearsal import Rehearsal
from prunekit.methods.base import space_and_cost
from prunekit.methods.settings import PruneSettings
from prunekit.models import PipelineShape, load_shape
from prunekit.runtime.errors import UserError

T = TypeVar("T")
COUNTED = ("depth", "include", "exclude", "convention", "resolution", "text_length")  # settings that costs depend on


class PlannedModel:
    """One model's shapes and costs."""

    def __init__(self, shape: PipelineShape, parts: Parts, lowered: bool = False):
        """Store a model's shape and other parts; lowered: its frozen weights are held in bfloat16."""
        self.shape, self.parts, self.lowered = shape, parts, lowered
        self.tokens = shape.text_length
        self._known: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make`, which is called once per key."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    @cached_property
    def rehearsal(self) -> Rehearsal:
        """Rehearsal that measures the memory of a step."""
        return Rehearsal(self.shape.denoiser, self.parts.autoencoder, self.lowered)

    @cached_property
    def params(self) -> int:
        """Number of parameters of the dense denoiser."""
        return sum(p.numel() for p in self.shape.denoiser.parameters())

    def costs(self, settings: PruneSettings) -> tuple[UnitSpace, CostModel]:
        """Return the unit space and the cost model for a method's settings."""
        key = ("costs", *(str(getattr(settings, name)) for name in COUNTED))
        return self.once(key, lambda: space_and_cost(self.shape, settings))

    def dense_macs(self, latent: tuple[int, int] | None = None) -> int:
        """Return the MACs of the dense denoiser at a latent size (h, w); None: its default size."""

        def count() -> int:
            return CostModel(self.shape.denoiser, discover(self.shape.denoiser, "none"), latent, self.tokens).dense_macs

        return self.once(("dense", latent), count)

    def picture_macs(self, latent: tuple[int, int]) -> tuple[int, int]:
        """Return the MACs of encoding and of decoding a picture of a latent (h, w)."""
        return self.once(("picture", latent), lambda: self.parts.picture_macs(latent))

    def latent(self, resolution: int | None = None) -> tuple[int, int]:
        """Return the latent size (h, w) of square pictures of `resolution` pixels; None: the model's resolution.

        Raises ValueError for a resolution that is not a multiple of the autoencoder's scale.
        """
        height, width = (resolution, resolution) if resolution else self.shape.resolution
        scale = self.shape.vae_scale_factor
        if height % scale:
            raise UserError(f"resolution={resolution} must be a multiple of the VAE's scale {scale}")
        return height // scale, width // scale

    def params_at(self, settings: PruneSettings, target: int) -> int:
        """Estimate the remaining parameters if every layer loses the same share and the MACs are `target`."""
        _, cost = self.costs(settings)

        def estimate() -> int:
            low, high = 0.0, 1.0
            for _ in range(40):
                middle = (low + high) / 2
                gates = torch.full((cost.space.size,), middle, dtype=torch.float64)
                low, high = (middle, high) if float(cost.macs(gates)) < target else (low, middle)
            return int(cost.params(torch.full((cost.space.size,), low, dtype=torch.float64)))

        return self.once(("params", id(cost), target), estimate)

    def describe(self, resolution: int | None = None) -> dict[str, Any]:
        """Return the plan's entry of the model. resolution: side of training pictures in pixels; None: the model's."""
        return {
            "name": self.shape.name,
            "unet": type(self.shape.denoiser).__name__,
            "params": self.params,
            "macs": self.dense_macs(),
            "resolution": list(self.shape.resolution),
            "training_resolution": [resolution, resolution] if resolution else list(self.shape.resolution),
            "text_length": self.tokens,
            "scheduler": type(self.parts.scheduler).__name__,
        }


class Models:
    """The models that plans have requested so far, each loaded once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str | None, bool], PlannedModel] = {}

    def get(self, name: str, single_file_config: str | None = None, lowered: bool = False) -> PlannedModel:
        """Return a model; arguments and errors as in `load_shape`. lowered: its frozen weights are held in bfloat16."""
        key = (name, single_file_config, lowered)
        if key not in self._known:
            shape = load_shape(name, single_file_config)
            self._known[key] = PlannedModel(shape, load_parts(name, shape.denoiser, single_file_config), lowered)
        return self._known[key]
