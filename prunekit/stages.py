"""The stages that a run and a comparison share: load and encode, choose, recover, sample, measure.

A stage's result appears whole or not at all, and is not made again where it is there already.
"""

import os
import time
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from prunekit.cost import CostModel
from prunekit.data.config import load_data
from prunekit.data.encoded import EncodedData, encode
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.evaluation import comparison
from prunekit.evaluation.agreement import AgreementSamples, agreement_samples, predictions
from prunekit.evaluation.comparison import Candidate, EvaluationSet, Judged, Sampling
from prunekit.evaluation.evaluator import load_evaluator
from prunekit.methods.base import Method, PruneResult, space_and_cost
from prunekit.models import load_pipeline, quiet_libraries
from prunekit.recipe import CommonRecipe
from prunekit.slicing import PrunedUNet2DConditionModel, slice_unet
from prunekit.stock import export_unet
from prunekit.training.checkpoint import Checkpoints, append_row, read_json, write_folder, write_json
from prunekit.training.diffusion import forward_process
from prunekit.training.fine_tuning import FineTuneConfig, fine_tune
from prunekit.training.progress import console
from prunekit.units import Architecture


class RunLog:
    """What a run says: lines for the person who watches, rows for `log.jsonl`."""

    def __init__(self, directory: Path):
        self.directory, self.started = directory, time.monotonic()

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to `log.jsonl`."""
        append_row(self.directory / "log.jsonl", row)

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        seconds = time.monotonic() - self.started
        console.print(f"[{int(seconds // 60):3d}:{int(seconds % 60):02d}] {text}", highlight=False, markup=False)
        self.log({"event": text, "seconds": round(seconds, 1)})


class Stages:
    """The model and data of a recipe, loaded once, and what is done with them."""

    def __init__(self, recipe: CommonRecipe, log: RunLog, cache: Path):
        quiet_libraries()
        self.recipe, self.log, self.say = recipe, log.log, log.say
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline: DiffusionPipeline = load_pipeline(
            recipe.model, lora=recipe.lora, single_file_config=recipe.single_file_config, say=log.say
        ).to(device)
        images = load_data(recipe.data, recipe.seed)
        self.resolution = recipe.resolution or self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        self.encoder = load_prompt_encoder(recipe.prompt_encoder)
        self.data: EncodedData = encode(
            self.pipeline, images, self.encoder, self.resolution, cache / "encoded.safetensors"
        )
        images = self.data.images  # without what could not be decoded
        held_out = int(images.held_out.sum())
        self.say(f"{images.num_images:,} images, {images.num_pairs:,} captions ({held_out:,} held out)")

    @cached_property
    def model_digest(self) -> str:
        """Hash of the dense UNet's weights."""
        return Fingerprint("unet").add_module(self.pipeline.unet).key()

    @cached_property
    def data_digest(self) -> str:
        """Hash of the images, the captions, and the frozen encoders' weights; the same on every machine."""
        images = self.data.images
        fingerprint = Fingerprint(self.resolution).add_pictures(images.encoded).add_texts(images.captions)
        return fingerprint.add_encoders(self.pipeline).key()

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions and device, for the record."""
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        cuda = torch.cuda.is_available()
        device = (
            torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s) of {os.cpu_count()}"
        )
        return {**versions, "device": device}

    @cached_property
    def cost(self) -> CostModel:
        """What counts the exact MACs of the table."""
        return space_and_cost(self.pipeline, self.recipe.prune.model_copy(update={"convention": "exact"}))[1]

    @cached_property
    def evaluator(self) -> Any:
        """The model that judges pictures."""
        return load_evaluator(self.recipe.evaluator)

    @cached_property
    def sampling(self) -> Sampling:
        """How every row's pictures are made."""
        settings = self.recipe.evaluation
        return Sampling(settings.steps, settings.guidance, settings.batch_size, settings.precision)

    @cached_property
    def prompts(self) -> EvaluationSet:
        """What every row is measured on."""
        count = self.recipe.evaluation.num_images
        return EvaluationSet.build(
            self.data.images, count, self.recipe.seed, self.evaluator, self.encoder, self.resolution
        )

    @cached_property
    def agreement(self) -> tuple[AgreementSamples, Tensor]:
        """The fixed (image, t, noise) triples, and the dense UNet's predictions for them."""
        samples = agreement_samples(
            self.data.latents[self.data.image_index],
            self.data.text,
            forward_process(self.pipeline.scheduler),
            self.recipe.seed,
            self.recipe.evaluation.num_predictions,
            self.data.conditions(torch.arange(self.data.images.num_pairs)).get("added_cond_kwargs"),
        )
        return samples, predictions(self.pipeline.unet, samples)

    @cached_property
    def dense(self) -> Candidate:
        """The unpruned model."""
        return Candidate("dense", [self.pipeline.unet], [self.cost.dense_macs], [self.cost.dense_params])

    def choose(self, method: Method, folder: Path, name: str | None = None) -> PruneResult:
        """Return a method's architectures, or what an earlier start chose."""
        if (folder / "result.json").is_file():
            return PruneResult.load(folder, self.pipeline.unet)
        started = time.monotonic()
        result = method.prune(self.pipeline, self.data, folder, log=self.log)
        ratio = result.info.get("mixture_ratio", result.info["ratio"][0])
        name = name or method.name
        self.say(f"{name}: {len(result.architectures)} architecture(s) at {ratio:.4f} of the dense MACs")
        self.log({"stage": name, "seconds": time.monotonic() - started, "ratio": ratio})
        return result

    def recover(self, name: str, result: PruneResult, folder: Path, config: FineTuneConfig, seed: int) -> Candidate:
        """Slice and fine-tune a method's architectures, each on the prompts routed to it."""
        pairs = self.data.training_pairs()
        routed = None if result.router is None else result.router.route(self.data.prompts[pairs])
        unets, seconds = [], float(result.info.get("search", {}).get("seconds", 0.0))
        for index, architecture in enumerate(result.architectures):
            own = pairs if routed is None else pairs[routed == index]
            unet, spent = self._expert(folder / str(index), f"{name} {index}", architecture, own, config, seed)
            unets.append(unet)
            seconds += spent
        cost = CostModel(self.pipeline.unet, result.space, self.cost.sample_size, self.cost.text_length)
        macs = [cost.macs(architecture) for architecture in result.architectures]
        params = [cost.params(architecture) for architecture in result.architectures]
        return Candidate(name, unets, macs, params, result.router, seconds)

    def _expert(
        self, folder: Path, title: str, architecture: Architecture, pairs: Tensor, config: FineTuneConfig, seed: int
    ) -> tuple[PrunedUNet2DConditionModel, float]:
        """Return one fine-tuned expert and the seconds that it took; an expert without prompts stays as sliced."""
        unet, device = folder / "unet", self.pipeline.unet.device
        if not unet.is_dir():
            student = slice_unet(self.pipeline.unet, architecture).to(device)
            figures: dict[str, float] = {"steps": 0, "seconds": 0.0}
            if len(pairs):
                options = {"scheduler": self.pipeline.scheduler, "pairs": pairs, "seed": seed, "title": title}
                checkpoints = folder / "checkpoints"
                figures = fine_tune(
                    student, self.pipeline.unet, self.data, config, checkpoints, log=self.log, **options
                )
            write_json(folder / "figures.json", figures)
            write_folder(unet, lambda temporary: export_unet(student, temporary))
            Checkpoints(folder / "checkpoints").clear()
            self.say(f"{title}: fine-tuned on {len(pairs):,} captions")
        student = PrunedUNet2DConditionModel.from_pretrained(unet).to(device).eval()
        return student.requires_grad_(False), float(read_json(folder / "figures.json")["seconds"])

    def sample(self, candidate: Candidate, folder: Path, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Return every prompt's picture, uint8 (n, 3, H, W), and its expert (n,); `seed` keys the noise."""
        return comparison.sample(candidate, self.pipeline, self.prompts.reseeded(seed), self.sampling, folder)

    def judge(self, pictures: Tensor) -> Judged:
        """Return what the evaluator sees in a row's pictures."""
        return comparison.judge(pictures, self.prompts, self.evaluator)

    def measure(self, candidate: Candidate, judged: Judged) -> dict[str, Any]:
        """Return a row's figures."""
        samples, reference = self.agreement
        return comparison.measure(candidate, judged, self.prompts, self.data, samples, reference, self.dense)
