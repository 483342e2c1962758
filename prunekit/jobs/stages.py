"""The stages that a run and a comparison share: load and encode, choose, recover, sample, measure.

A stage's result is written completely or not at all, and an existing result is not computed again.
"""

import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from prunekit.core.cost import CostModel
from prunekit.core.registry import denoiser_in, family_of
from prunekit.data.config import load_data
from prunekit.data.encoded import EncodedData, encode
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.images import HELD_OUT, TRAINING, Split
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.evaluation import comparison
from prunekit.evaluation.agreement import AgreementSamples, agreement_errors, data_samples, predictions
from prunekit.evaluation.ceiling import REAL, REAL_TRAINING, evaluator_ceiling, real_figures
from prunekit.evaluation.comparison import Candidate, EvaluationSet, Judged, Prompts, Sampling
from prunekit.evaluation.features import load_evaluator
from prunekit.evaluation.generate import read_pictures
from prunekit.evaluation.table import SEEN
from prunekit.evaluation.uncertainty import error_of_mean, jackknife_errors
from prunekit.jobs.recipe import CommonRecipe
from prunekit.measuring.environment import device_name
from prunekit.methods.base import Method, space_and_cost
from prunekit.methods.result import PruneResult
from prunekit.models import load_pipeline, quiet_libraries, resolution_of
from prunekit.runtime.digests import Digests
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import append_row
from prunekit.runtime.precision import resolve_precision
from prunekit.runtime.processes import current
from prunekit.runtime.progress import Log, console, peak_memory
from prunekit.runtime.run_directory import DENSE, LOCKS, LOG, RESULT
from prunekit.runtime.tracking import Trackers
from prunekit.runtime.work import Piece, Sharing, do_together, share
from prunekit.training.memory import lower, offload

PACKAGE = __name__.partition(".")[0]


class RunLog:
    """The log of a run: lines on the terminal, and rows in `log.jsonl` and in trackers."""

    def __init__(self, directory: Path, trackers: Trackers | None = None):
        self.directory, self.trackers, self.started = directory, trackers, time.monotonic()

    @classmethod
    def of(cls, recipe: CommonRecipe, directory: Path) -> "RunLog":
        """Return the log of a recipe's run, with the trackers that the recipe names."""
        return cls(directory, Trackers(recipe.tracking, recipe.name, directory, recipe.model_dump(mode="json")))

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to `log.jsonl` and to trackers; while processes work together, only the main one does this."""
        if not current().is_main:
            return
        if "step" in row and "memory" not in row:
            row = {**row, "memory": peak_memory()}
        append_row(self.directory / LOG, row)
        if self.trackers is not None:
            self.trackers.log(row)

    def say(self, text: str) -> None:
        """Print and log a line with the time since the start; while processes work together, only the main one does."""
        if not current().is_main:
            return
        seconds = time.monotonic() - self.started
        line = f"[{int(seconds // 60):3d}:{int(seconds % 60):02d}] {text}"
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)
        self.log({"event": text, "seconds": round(seconds, 1)})


def _cache(recipe: CommonRecipe, directory: Path) -> Path:
    """Return the directory of a recipe's encoded data; raise a one-line ValueError if it cannot be created."""
    if not recipe.cache.directory:
        return directory / "cache"
    folder = Path(recipe.cache.directory).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache.directory={folder} cannot be created: {error.strerror}") from error
    return folder


@contextmanager
def errors_of_plug_ins(method: Method) -> Iterator[None]:
    """Turn a ValueError of another package's method into a UserError, unless a library that it calls raised it."""
    try:
        yield
    except ValueError as error:
        *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
        owner = type(method).__module__.partition(".")[0]
        raised_in = frame.f_globals.get("__name__", "").partition(".")[0]
        if isinstance(error, UserError) or owner == PACKAGE or raised_in != owner:
            raise
        raise UserError(f"{method.name}: {error}") from error


def _held_pipeline(recipe: CommonRecipe, device: torch.device, log: Log) -> DiffusionPipeline:
    """Load a recipe's pipeline, with the dtype and the offloading that its section `memory` sets."""
    lowered, dtype = recipe.memory.weights == "bfloat16", getattr(torch, recipe.memory.weights)
    pipeline = load_pipeline(
        recipe.model, dtype, lora=recipe.lora, single_file_config=recipe.single_file_config, say=log.say
    )
    if lowered:
        lower(denoiser_in(pipeline))
    if not recipe.memory.offload:
        return pipeline.to(device)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module) and part is not denoiser_in(pipeline):
            offload(part, device)
    denoiser_in(pipeline).to(device)
    return pipeline


def _environment(device: torch.device) -> dict[str, Any]:
    """Return the versions, the device and the meaning of precision `auto` on it, to record them."""
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {**versions, "device": device_name(device), "precision": resolve_precision("auto", device)}


class Stages:
    """The model and data of a recipe, loaded once, and the stages that use them."""

    def __init__(self, recipe: CommonRecipe, log: Log, directory: Path):
        quiet_libraries()
        self.recipe, self.log, self.say = recipe, log.log, log.say
        self.locks = directory / LOCKS
        self.device = current().device
        self.environment = _environment(self.device)  # read now: the threads change while processes work apart
        self.cache = _cache(recipe, directory)
        self.pipeline = _held_pipeline(recipe, self.device, log)
        images = load_data(recipe.data, recipe.seed, self.cache)
        self.resolution = recipe.resolution or resolution_of(self.pipeline)
        self.encoder = load_prompt_encoder(recipe.prompt_encoder)
        self.data: EncodedData = encode(self.pipeline, images, self.encoder, self.resolution, self.cache, recipe.cache)
        images = self.data.images  # without pictures that could not be decoded
        held_out = f"{int(images.held_out.sum()):,} held out"
        if images.holdout_by == "pictures":
            held_out += f", with {len(images.held_out_pictures()):,} pictures"
            held_out += f", {images.held_by_closure:,} of them as duplicates of others" * bool(images.held_by_closure)
        self.say(f"{images.num_images:,} images, {images.num_pairs:,} captions ({held_out})")
        if recipe.data.holds_pictures and not images.holds_pictures:
            self.say(
                "warning: no picture can be held out, because chains of similar pictures and shared captions "
                "connect all of them; all figures are of training pictures"
            )

    @cached_property
    def model_digest(self) -> str:
        """Hash of the dense model's weights."""
        return Fingerprint("unet").add_module(denoiser_in(self.pipeline)).key()

    @cached_property
    def data_digest(self) -> str:
        """Hash of the images, the captions, and the frozen encoders' weights; the same on every machine."""
        images = self.data.images
        fingerprint = Fingerprint(self.resolution).add_pictures(images.encoded, Digests(self.cache))
        return fingerprint.add_texts(images.captions).add_encoders(self.pipeline).key()

    @cached_property
    def cost(self) -> CostModel:
        """Cost model of the exact MACs in the table."""
        return space_and_cost(self.pipeline, self.recipe.prune.model_copy(update={"convention": "exact"}))[1]

    @cached_property
    def evaluator(self) -> Any:
        """The model that judges pictures."""
        return load_evaluator(self.recipe.evaluator)

    @cached_property
    def sampling(self) -> Sampling:
        """Settings with which the pictures of all rows are generated."""
        settings = self.recipe.evaluation
        return Sampling(settings.steps, settings.guidance, settings.batch_size, settings.precision)

    @property
    def split(self) -> Split | None:
        """Split on which rows are measured: held-out pictures; None: none are held out, and all pictures are used."""
        return HELD_OUT if self.data.images.holds_pictures else None

    @property
    def num_seen_images(self) -> int:
        """Number of pictures that a row draws for prompts of training pictures."""
        return self.recipe.evaluation.seen_images(self.split is not None)

    @cached_property
    def drawn_prompts(self) -> Prompts:
        """Prompts that every row draws, and the real pictures that its pictures are compared with."""
        settings = self.recipe.evaluation
        return self._prompts(settings.num_images, settings.num_references, self.split)

    @cached_property
    def drawn_seen_prompts(self) -> Prompts | None:
        """Prompts of training pictures that every row also draws, with as many references as `drawn_prompts`."""
        if not self.num_seen_images:
            return None
        return self._prompts(self.num_seen_images, self.drawn_prompts.real_images.num_images, TRAINING)

    def _prompts(self, count: int, num_references: int, split: Split | None) -> Prompts:
        return Prompts.choose(self.data.images, count, self.recipe.seed, self.encoder, num_references, split)

    @cached_property
    def prompts(self) -> EvaluationSet:
        """`drawn_prompts` with the evaluator's features of the real pictures; every row is measured on them."""
        return self._looked_at(self.drawn_prompts)

    @cached_property
    def seen_prompts(self) -> EvaluationSet | None:
        """`drawn_seen_prompts` with the evaluator's features of the real pictures; None without such prompts."""
        return None if self.drawn_seen_prompts is None else self._looked_at(self.drawn_seen_prompts)

    def _looked_at(self, prompts: Prompts) -> EvaluationSet:
        images = None if self.split is None else self.data.images
        return EvaluationSet.of(prompts, self.evaluator, self.resolution, images, self.recipe.seed)

    @cached_property
    def agreement(self) -> tuple[AgreementSamples, Tensor]:
        """The fixed (image, t, noise) triples, and the dense model's predictions for them."""
        return self._agreement(self.split)

    @cached_property
    def seen_agreement(self) -> tuple[AgreementSamples, Tensor]:
        """The triples and predictions of `agreement`, but for training pictures."""
        return self._agreement(TRAINING)

    def _agreement(self, split: Split | None) -> tuple[AgreementSamples, Tensor]:
        count, pairs = self.recipe.evaluation.num_predictions, self.data.images.pairs_of(split)
        samples = data_samples(self.data, self.pipeline, self.recipe.seed, count, pairs)
        return samples, predictions(denoiser_in(self.pipeline), samples)

    @cached_property
    def known(self) -> dict[str, dict[str, float]]:
        """The evaluator's figures of known pictures, by row; see `evaluator_ceiling`."""
        prompts, seen = self.prompts, self.seen_prompts
        rows = evaluator_ceiling(
            self.evaluator,
            prompts.real_images,
            shown=prompts.targets.unique(),  # the pictures that the prompts of a row describe
            autoencoder=self.pipeline.vae,
            family=family_of(self.pipeline),
            size=self.resolution,
            seed=self.recipe.seed,
        )
        rows[REAL] |= prompts.floors
        if seen is not None:
            shown = seen.targets.unique()
            rows[REAL_TRAINING] = real_figures(self.evaluator, seen.real_images, shown, self.resolution) | seen.floors
        return rows

    @cached_property
    def dense(self) -> Candidate:
        """The dense model as a row of the table."""
        return Candidate(DENSE, [denoiser_in(self.pipeline)], [self.cost.dense_macs], [self.cost.dense_params])

    def held(self, student: ModelMixin, trains: bool = False) -> ModelMixin:
        """Return a pruned model on the device, in the recipe's dtype; trains: all weights are trained, in float32."""
        student = student.to(self.device)
        if self.recipe.memory.weights == "float32":
            return student
        return student.float() if trains else lower(student)

    def choose(self, method: Method, folder: Path, name: str | None = None) -> PruneResult:
        """Return a method's architectures, chosen now or by an earlier start.

        The processes of a launch choose together. Of several launches on one directory, one chooses and the others
        wait. folder: folder of the result. name: name of the row in the log; the method's by default.
        """
        name = name or method.name

        def done() -> bool:
            return (folder / RESULT).is_file()

        def log(row: dict[str, Any]) -> None:
            stage = f"{name}{row['stage'].removeprefix(method.name)}"  # several rows may share a method
            self.log({**row, "stage": stage})

        def prune() -> None:
            started = time.monotonic()
            with errors_of_plug_ins(method):
                result = method.prune(self.pipeline, self.data, folder, log=log)
            ratio = result.info.mean_ratio
            self.say(f"{name}: {len(result.architectures)} architecture(s) at {ratio:.4f} of the dense MACs")
            for note in (*result.notes(), *result.warnings()):
                self.say(f"{name}: {note}")
            self.log({"stage": name, "seconds": time.monotonic() - started, "ratio": ratio})

        do_together(Piece(f"{folder.name}-choice", done, prune), self.locks)
        return PruneResult.load(folder, denoiser_in(self.pipeline))

    def share(self, pieces: Sequence[Piece]) -> None:
        """Do pieces of work, shared with the other processes that work in the directory."""
        share(pieces, self.locks)

    def draw(
        self,
        candidate: Candidate,
        folder: Path,
        seed: int | None = None,
        prompts: Prompts | None = None,
        sharing: Sharing | None = None,
    ) -> tuple[list[Path], Tensor]:
        """Draw a picture for every prompt; return the pictures' files and their experts (n,).

        seed: seed of the noise; None: that of the prompts. prompts: prompts to draw; `drawn_prompts` by default.
        sharing: function that does the work with other processes; `share` by default.
        """
        prompts = (prompts or self.drawn_prompts).reseeded(seed)
        return comparison.sample(candidate, self.pipeline, prompts, self.sampling, folder, sharing or self.share)

    def sample(
        self, candidate: Candidate, folder: Path, seed: int | None = None, prompts: Prompts | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return every prompt's picture, uint8 (n, 3, H, W), and its expert (n,), as `draw` draws them."""
        files, experts = self.draw(candidate, folder, seed, prompts)
        return read_pictures(files), experts

    def sample_seen(self, candidate: Candidate, folder: Path, seed: int | None = None) -> Tensor | None:
        """Return the picture of every prompt of a training picture; None if none are requested."""
        seen = self.drawn_seen_prompts
        return None if seen is None else self.sample(candidate, folder, seed, seen)[0]

    def judge(self, pictures: Tensor) -> Judged:
        """Return the evaluator's features and embeddings of a row's pictures."""
        return comparison.judge(pictures, self.prompts, self.evaluator)

    def measure(
        self, candidate: Candidate, judged: Judged, seen: Tensor | None = None
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Return a row's figures, and their standard errors over its pictures and agreement samples.

        seen: pictures for prompts of training pictures; their figures are added with the prefix `SEEN`.
        """
        errors = self._agreement_errors(candidate, self.agreement)
        figures = comparison.measure(
            candidate, judged, self.prompts, self.data, self.dense, agreement=float(errors.mean())
        )
        spread = {**jackknife_errors(judged, self.prompts), "agreement": error_of_mean(errors)}
        if seen is None:
            return figures, spread
        prompts = self.seen_prompts
        assert prompts is not None, "there are pictures, so there are prompts"
        agreement = float(self._agreement_errors(candidate, self.seen_agreement).mean())
        seen_figures = comparison.quality(comparison.judge(seen, prompts, self.evaluator), prompts, agreement)
        return figures | {f"{SEEN}{name}": value for name, value in seen_figures.items()}, spread

    def _agreement_errors(self, candidate: Candidate, agreement: tuple[AgreementSamples, Tensor]) -> Tensor:
        samples, reference = agreement
        experts = candidate.experts_of(self.data.prompts, samples.indices)
        return agreement_errors(reference, candidate.models, samples, experts)
