"""APTP as a method: search, then deterministic experts that meet the budget, and a router (ICLR 2025)."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline

from prunekit.data.encoded import EncodedData
from prunekit.data.images import CaptionedImages
from prunekit.gates import gated
from prunekit.methods.aptp.router import ArchitecturePredictor, Router
from prunekit.methods.aptp.search import APTPConfig, Codes, SearchObjective
from prunekit.methods.aptp.transport import expert_potentials
from prunekit.methods.base import Method, PruneResult, describe_result, space_and_cost
from prunekit.methods.budget import budget_macs, select_mixture
from prunekit.methods.registry import register
from prunekit.training.diffusion import forward_process
from prunekit.training.trainer import Log, Trainer


@register("aptp")
class APTP(Method):
    """Adaptive Prompt-Tailored Pruning: a mixture of pruned experts and a router (Ganjdanesh et al., ICLR 2025)."""

    Config = APTPConfig
    config: APTPConfig

    def prune(
        self,
        pipeline: DiffusionPipeline,
        dataset: EncodedData | CaptionedImages,
        directory: str | Path | None = None,
        log: Log | None = None,
    ) -> PruneResult:
        """Search N architectures and their router on a data set.

        Args:
            pipeline: a Stable Diffusion pipeline; its UNet stays as it is.
            dataset: encoded data, or captioned images, which are then encoded with the embedded prompt encoder.
            directory: where checkpoints go, for resuming, and the result; a temporary one if None.
            log: takes one row a few steps.

        Returns:
            N Architectures whose mean cost over the training prompts, by inference routing, meets the budget (law 3),
            the router, and in `info` each expert's share of the training prompts.

        """
        if directory is None:
            with TemporaryDirectory() as temporary:
                return self.prune(pipeline, dataset, temporary, log)
        directory = Path(directory)
        data = _encoded(pipeline, dataset)
        pairs = data.training_pairs()
        config, unet = self.config, pipeline.unet
        if config.experts > len(pairs):
            raise ValueError(f"experts={config.experts} exceed the {len(pairs)} training prompts")
        space, cost = space_and_cost(pipeline, config)
        budget_macs(cost, config.budget)  # refuses a budget below the floor before the search
        predictor, codes = self._parameters(data.prompts.shape[1], space.size)
        unet.eval().requires_grad_(False)
        with gated(unet, space) as gates:
            objective = SearchObjective(
                unet, gates, predictor, codes, cost, forward_process(pipeline.scheduler), data, config, unet.device
            )
            trainer = Trainer(config.search, objective, directory / "checkpoints", f"{self.name} search", log)
            figures = trainer.fit()
        router = Router.from_codes(predictor, codes.values)
        if config.balance:
            router = router.shifted(expert_potentials(router.scores(data.prompts[pairs]), config.epsilon))
        counts = torch.bincount(router.route(data.prompts[pairs]), minlength=config.experts)
        router = router.with_fallback(int(counts.argmax()))
        experts = select_mixture(codes.values.detach().cpu(), counts, cost, config.budget)
        info = describe_result(self, experts, cost)
        info["prompts_per_expert"] = counts.tolist()
        shares = counts.double() / counts.sum()
        info["mixture_ratio"] = float((shares * torch.tensor(info["ratio"], dtype=torch.float64)).sum())
        info["search"] = figures
        result = PruneResult(experts, router, info)
        result.save(directory)
        trainer.checkpoints.clear()
        return result

    def _parameters(self, embedding_size: int, num_units: int) -> tuple[ArchitecturePredictor, Codes]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return ArchitecturePredictor(embedding_size, num_units), Codes(self.config.experts, num_units)


def _encoded(pipeline: Any, dataset: EncodedData | CaptionedImages) -> EncodedData:
    if isinstance(dataset, EncodedData):
        return dataset
    from prunekit.data.encoded import encode
    from prunekit.data.prompt_encoder import load_prompt_encoder

    resolution = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return encode(pipeline, dataset, load_prompt_encoder("emoji"), resolution)
