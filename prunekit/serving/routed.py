"""A pruned model as one thing: the base pipeline, its experts, and the router that sends each prompt to one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.methods.base import PruneResult
from prunekit.models import load_pipeline
from prunekit.sampling import draw, quiet
from prunekit.slicing import PrunedUNet2DConditionModel


class RoutedModel:
    """A base pipeline whose UNet is replaced, prompt by prompt, by the expert that the router chooses.

    Args:
        pipeline: the dense pipeline; its UNet is put back after every call.
        expert: gives the UNet of expert i; called once for each expert that is used.
        num_experts: N.
        route: maps n prompts to expert indices, LongTensor (n,).
        guidance: the guidance scale of `generate` where none is asked for.

    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        expert: Callable[[int], UNet2DConditionModel],
        num_experts: int,
        route: Callable[[list[str]], Tensor],
        guidance: float = 7.5,
    ):
        self.pipeline, self.num_experts, self.route, self.guidance = pipeline, num_experts, route, guidance
        self._load, self._experts = expert, {}

    @classmethod
    def load(
        cls, run_directory: str | Path, method: str = "aptp", device: str | torch.device | None = None
    ) -> "RoutedModel":
        """Load what a run made by one method; experts are read when they are first used.

        device: where it runs; by default a GPU where there is one.
        Raises FileNotFoundError for a directory without a run, and ValueError for a method that the run has not.
        """
        run_directory = Path(run_directory)
        recipe = run_directory / "recipe.yaml"
        if not recipe.is_file():
            raise FileNotFoundError(f"{run_directory} is no run directory: it holds no recipe.yaml")
        settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        directory = _method_directory(run_directory, method)
        result = PruneResult.load(directory)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        own = {"lora": settings.get("lora", ()), "single_file_config": settings.get("single_file_config")}
        pipeline = load_pipeline(settings["model"], **own).to(device)

        def expert(index: int) -> UNet2DConditionModel:
            folder = directory / "experts" / str(index) / "unet"
            if not folder.is_dir():
                raise FileNotFoundError(f"expert {index} of {method} is not there yet ({folder}); resume the run")
            unet = PrunedUNet2DConditionModel.from_pretrained(folder).to(device, torch.float32)
            return unet.eval().requires_grad_(False)

        route = _route(result, settings["prompt_encoder"])
        return cls(pipeline, expert, len(result.architectures), route, settings["evaluation"]["guidance"])

    def expert(self, index: int) -> UNet2DConditionModel:
        """Return the UNet of expert `index`."""
        if index not in self._experts:
            self._experts[index] = self._load(index)
        return self._experts[index]

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 25,
        guidance: float | None = None,
        batch_size: int = 1,
        progress: Callable[[int], Any] = lambda done: None,
    ) -> tuple[Tensor, Tensor]:
        """Draw one picture a prompt; prompts of one expert run together.

        batch_size: pictures of one pipeline call. At 1 a picture has the same bytes whatever is asked with it; in
        larger batches it is the same up to the rounding of the device's kernels.
        progress: is told how many pictures are done.
        Returns the pictures, uint8 (n, 3, H, W), and each prompt's expert, LongTensor (n,).
        """
        if len(prompts) != len(seeds) or not len(prompts):
            raise ValueError(f"one seed a prompt is needed, got {len(prompts)} prompts and {len(seeds)} seeds")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        experts, guidance = self.route(list(prompts)), self.guidance if guidance is None else guidance
        pictures: dict[int, Tensor] = {}
        dense = self.pipeline.unet
        try:
            with quiet(self.pipeline):
                for index in experts.unique().tolist():
                    self.pipeline.unet = self.expert(index)
                    for part in torch.nonzero(experts == index).flatten().split(batch_size):
                        batch = part.tolist()
                        drawn = draw(
                            self.pipeline, [prompts[i] for i in batch], [seeds[i] for i in batch], steps, guidance
                        )
                        pictures |= dict(zip(batch, drawn, strict=True))
                        progress(len(pictures))
        finally:
            self.pipeline.unet = dense
        return torch.stack([pictures[i] for i in range(len(prompts))]), experts


def _method_directory(run_directory: Path, method: str) -> Path:
    directory = run_directory / "methods" / method
    if not (directory / "result.json").is_file():
        finished = sorted(path.parent.name for path in run_directory.glob("methods/*/result.json"))
        known = f"it has {', '.join(finished)}" if finished else "it has none yet; resume it first"
        raise ValueError(f"{run_directory} has no result of method {method!r}: {known}")
    return directory


def _route(result: PruneResult, prompt_encoder: str) -> Callable[[list[str]], Tensor]:
    if result.router is None:
        return lambda prompts: torch.zeros(len(prompts), dtype=torch.long)
    encoder = load_prompt_encoder(prompt_encoder)
    return lambda prompts: result.router.route(encoder.encode(prompts))
