"""PromptRoutedPipeline: a pipeline that draws each prompt with the denoiser that the router chooses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from prunekit.core.cost import CostModel
from prunekit.core.discovery import discover
from prunekit.core.registry import family_named, latent_size, text_length
from prunekit.core.timesteps import TimestepModel
from prunekit.data.prompt_encoder import EMBEDDED, PromptEncoder, load_prompt_encoder
from prunekit.export.pipeline_parts import Parts
from prunekit.methods.router import Router
from prunekit.runtime.errors import UserError
from prunekit.serving.experts import DEFAULT_GUIDANCE, Experts, Mixture
from prunekit.serving.routed_call import RoutedCall
from prunekit.serving.routed_directory import load, save

OPTIONAL = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")  # parts that some pipelines have
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler", *OPTIONAL)


class PromptRoutedPipeline(RoutedCall, DiffusionPipeline):
    """A base pipeline that draws each prompt with the expert that the router chooses.

    Call it like the base pipeline. Prompts of one expert run together, `batch_size` of them per call of the stock
    pipeline. Images are returned in the order of the prompts, and the noise of each depends only on its seed. Assign
    any diffusers scheduler to `.scheduler`. Many threads may call one pipeline. Create it by `from_pretrained` or
    `from_experts`.
    """

    _optional_components = list(OPTIONAL)  # noqa: RUF012 (as diffusers has it)

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        parts: Parts | None = None,
        mixture: Mixture | None = None,
    ):
        super().__init__()
        if parts is None or mixture is None:
            raise UserError("create a PromptRoutedPipeline with from_pretrained(RUN or DIRECTORY) or from_experts")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        self.parts, self.mixture = parts, mixture
        self.kind, self.family = parts.kind, family_named(parts.kind.__name__)
        self._prepare()
        self._macs: dict[tuple[tuple[int, int], tuple[int, int]], int] = {}

    @classmethod
    def of(cls, parts: Parts, mixture: Mixture) -> PromptRoutedPipeline:
        """Return a routed pipeline that combines a pipeline's parts with a mixture of experts."""
        given = {name: parts.components[name] for name in PARTS if name in parts.components}
        return cls(**given, parts=parts, mixture=mixture)

    @classmethod
    def from_experts(
        cls,
        pipeline: DiffusionPipeline,
        experts: Sequence[ModelMixin],
        router: Router | None = None,
        prompt_encoder: PromptEncoder | str | Path = EMBEDDED,
        guidance: float = DEFAULT_GUIDANCE,
    ) -> PromptRoutedPipeline:
        """Return a routed pipeline of denoisers that are in memory; it shares a pipeline's other parts.

        Args:
            pipeline: the base pipeline; its denoiser is not used.
            experts: denoisers; they are put into evaluation mode, frozen, and moved together with the routed pipeline.
            router: assigns prompts to the experts; None for a single expert.
            prompt_encoder: embeds prompts for the router; an encoder, or a name or path from which to load one.
            guidance: default guidance scale.

        Raises:
            UserError: the router has another number of experts.

        """
        if (1 if router is None else router.num_experts) != len(experts):
            known = "no router, which takes one expert" if router is None else f"a router of {router.num_experts}"
            raise UserError(f"{len(experts)} experts with {known}: give as many experts as the router has")
        models = [model.eval().requires_grad_(False) for model in experts]
        held = Experts(
            lambda index, device, dtype: models[index].to(device=device, dtype=dtype),
            lambda index: models[index].num_parameters(),
            len(models),
            pipeline.device,
            pipeline.dtype,
        )
        encoder = load_prompt_encoder(prompt_encoder) if isinstance(prompt_encoder, str | Path) else prompt_encoder
        return cls.of(Parts.of(pipeline), Mixture(held, router, encoder if router else None, guidance))

    @classmethod
    def from_pretrained(  # noqa: D417
        cls,
        directory: str | Path,
        method: str | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        max_resident: int | None = None,
        max_bytes: int | None = None,
    ) -> PromptRoutedPipeline:
        """Load a routed pipeline from a run, a saved pipeline, an export, or any diffusers pipeline (one expert).

        Args:
            directory: directory of the run or the pipeline.
            method: method of the run whose models draw; by default the method that routes, else the first by name.
            device: device to draw on; by default a GPU if there is one, else the CPU.
            dtype: dtype of all weights.
            max_resident, max_bytes: largest number of experts in memory, and largest size of their weights in bytes; by
                default no limit. An expert is read when it is first used; the least recently used one is removed first.

        Raises:
            FileNotFoundError: the directory holds no model.
            ValueError: the model is faulty.

        """
        parts, mixture = load(Path(directory), method, device, dtype, max_resident, max_bytes)
        return cls.of(parts, mixture)

    def save_pretrained(self, save_directory: str | Path, tier: str = "auto") -> None:
        """Write base pipeline, experts, router and prompt encoder as one directory of safetensors and JSON.

        tier: tier of the experts' files, as in `prunekit export`.
        """
        save(self.parts, self.mixture, Path(save_directory), tier)

    @property
    def text_length(self) -> int:
        """Number of tokens that the denoiser takes of a prompt; reading it loads no expert."""
        return text_length(self._base(None), self.family)

    def _around(self, model: ModelMixin | None) -> DiffusionPipeline:
        given = {name: getattr(self, name) for name in PARTS if name != "scheduler" and name in self.parts.components}
        return self.parts.pipeline(model, **given)

    def _latent_size(self, model: ModelMixin) -> tuple[int, int]:
        return latent_size(model)

    def _macs_of(self, expert: int, model: ModelMixin, base: DiffusionPipeline, size: tuple[int, int]) -> int:
        timesteps = torch.as_tensor(base.scheduler.timesteps)
        if not isinstance(model, TimestepModel):
            return self._call_macs((expert, 0), model, size) * len(timesteps)
        bins = model.bins.of(timesteps).tolist()
        return sum(self._call_macs((expert, index), model.slices[index], size) for index in bins)

    def _call_macs(self, slot: tuple[int, int], model: ModelMixin, size: tuple[int, int]) -> int:
        """Return the exact MACs of one denoiser call for one image.

        slot: index of the expert, and of the bin of timesteps. size: height and width of the latent.
        """
        if (slot, size) not in self._macs:
            cost = CostModel(model, discover(model, "none"), size, self.text_length)
            self._macs[slot, size] = cost.dense_macs
        return self._macs[slot, size]
