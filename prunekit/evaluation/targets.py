"""Targets of an evaluation: a run with its dense model and experts, or any diffusers pipeline."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PNDMScheduler

from prunekit.core.cost import CostModel
from prunekit.core.registry import denoiser_in, denoiser_name
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.evaluation.comparison import Candidate, StoredModels
from prunekit.evaluation.protocols import Protocol
from prunekit.methods.base import space_and_cost
from prunekit.methods.result import PruneResult
from prunekit.methods.settings import PruneSettings
from prunekit.models import load_pipeline, load_pipeline_of
from prunekit.models.names import DENOISERS, local_path
from prunekit.recovery.in_memory import BACKBONE
from prunekit.runtime.digests import Digests
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json
from prunekit.runtime.processes import current
from prunekit.runtime.run_directory import CELLS, DENSE, RECIPE, RESULT, ROUTER, WORK
from prunekit.runtime.yaml_files import read_mapping

INDEX = "model_index.json"  # of a pipeline
FILES = ("*.safetensors", "config.json")  # files that a model's output depends on


@dataclass(frozen=True)
class Subject:
    """A model under test in its pipeline, with a digest of all weights that its pictures depend on."""

    candidate: Candidate
    pipeline: DiffusionPipeline
    key: str
    encoder: Any | None = None  # prompt encoder of its router
    dense_macs: int | None = None  # MACs of the model that it was pruned from, if known


@dataclass(frozen=True)
class Target:
    """A place that holds models to evaluate; no model is loaded before `subjects` is called."""

    place: str
    name: str
    recipe: dict[str, Any] | None = None  # of a run

    @classmethod
    def at(cls, place: str | Path) -> "Target":
        """Return the target at a place, which is a run's directory, or a model that `load_pipeline` takes.

        Raises ValueError, one line, for a directory that is neither, and for a run without a finished method.
        """
        path = Path(place).expanduser()
        if not (path / RECIPE).is_file():
            local = local_path(place)
            if local is not None and local.is_dir() and not (local / INDEX).is_file():
                raise UserError(
                    f"{place} cannot be evaluated: it has neither {RECIPE} (a run) nor {INDEX} (a diffusers pipeline)"
                )
            if local is not None and local.is_dir() and not any((local / part).is_dir() for part in DENOISERS):
                raise UserError(f"{place} has no unet/: of routed experts that were exported, evaluate their run")
            return cls(str(place), path.stem if local is not None and local.is_file() else path.name)
        recipe = read_mapping(path / RECIPE)
        if "model" not in recipe or not (list(path.glob(f"methods/*/{RESULT}")) or list(path.glob(f"{CELLS}/*.json"))):
            raise UserError(
                f"{place} holds no finished method of a run (methods/*/{RESULT}) and no finished cell of a "
                f"comparison ({CELLS}/*.json): give the directory of `prunekit run` or `prunekit compare`, or "
                "resume it with `prunekit resume`"
            )
        return cls(str(place), path.resolve().name, recipe)

    def subjects(self, protocol: Protocol, digests: Digests) -> Iterator[Subject]:
        """Load the pipeline on this process's device and yield its models one by one; of a run, the dense model first.

        Raises ValueError, one line, if a model cannot be loaded, and FileNotFoundError if an expert is missing.
        """
        recipe, device = self.recipe, current().device
        pipeline = (load_pipeline(self.place) if recipe is None else load_pipeline_of(recipe)).to(device)
        if protocol.scheduler == "pndm":
            pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
        settings = PruneSettings(depth="none", resolution=protocol.resolution)
        cost = space_and_cost(pipeline, settings)[1]
        key = Fingerprint(_schedule(pipeline)).add_module(denoiser_in(pipeline)).add_encoders(pipeline).key()
        name = self.name if recipe is None else DENSE
        dense = Candidate(name, [denoiser_in(pipeline)], [cost.dense_macs], [cost.dense_params])
        yield Subject(dense, pipeline, key, None, None if recipe is None else cost.dense_macs)
        if recipe is None:
            return
        place = Path(self.place)
        stored_methods = [Stored(path.parent.name, path.parent, path.parent / "experts") for path in _results(place)]
        for name, models in _cells(place):
            if (models / RESULT).is_file():
                stored_methods.append(Stored(name, models, models))
        for stored in stored_methods:
            for step in (None, *protocol.at_steps):
                yield _pruned(stored, step, recipe, pipeline, cost, key, digests)


@dataclass(frozen=True)
class Stored:
    """A method's models on disk: the folder of its result, and the folder of its numbered experts."""

    name: str
    result: Path
    experts: Path


def _results(place: Path) -> list[Path]:
    return sorted(place.glob(f"methods/*/{RESULT}"))


def _cells(place: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and models' folder of every finished cell of a comparison, except cells of the dense model."""
    for path in sorted((place / CELLS).glob("*.json")):
        cell = read_json(path)
        if cell["cell"]["method"] != DENSE:
            yield path.stem, place / WORK / cell["models_folder"]


def _pruned(
    stored: Stored,
    step: int | None,
    recipe: dict[str, Any],
    pipeline: DiffusionPipeline,
    cost: CostModel,
    key: str,
    digests: Digests,
) -> Subject:
    """Return a method's experts, which are read on demand, with their router; `step` chooses stored weights of a step.

    Raises FileNotFoundError if an expert is missing.
    """
    result = PruneResult.load(stored.result, denoiser_in(pipeline))
    part = denoiser_name(pipeline) if step is None else f"step-{step}/{denoiser_name(pipeline)}"
    experts = range(result.num_experts)
    folders = [stored.experts / str(index) / part for index in experts]
    for index, place in enumerate(folders):
        if not place.is_dir():
            hint = "resume the run" if step is None else "name steps of the recipe's evaluation.at_steps"
            raise FileNotFoundError(f"expert {index} of {stored.name} does not exist ({place}); {hint}")
    result_cost = CostModel(denoiser_in(pipeline), result.space, cost.sample_size, cost.text_length)
    steps = int(recipe["evaluation"]["steps"])
    candidate = Candidate(
        stored.name if step is None else f"{stored.name}@{step}",
        StoredModels(folders, lambda model: model.to(current().device)),
        [result.expert_macs(result_cost, index, pipeline.scheduler, steps) for index in experts],
        [result.expert_params(result_cost, index) for index in experts],
        result.router,
    )
    files = [path for folder in folders for pattern in FILES for path in folder.rglob(pattern)]
    files += [path for pattern in FILES for path in (stored.experts / BACKBONE).rglob(pattern)]
    digest = Fingerprint(key, *digests.of([str(path) for path in sorted(files)]))
    encoder = None
    if result.router is not None:
        digest.add(recipe["prompt_encoder"], *digests.of([str(stored.result / ROUTER)]))
        encoder = load_prompt_encoder(recipe["prompt_encoder"])
    return Subject(candidate, pipeline, digest.key(), encoder, cost.dense_macs)


def _schedule(pipeline: DiffusionPipeline) -> tuple[str, dict[str, Any]]:
    """Return the scheduler's class and the settings that affect its result; others (`_…`) describe its origin."""
    config = pipeline.scheduler.config
    return type(pipeline.scheduler).__name__, {key: config[key] for key in sorted(config) if key[0] != "_"}


def embeddings_of(subject: Subject, prompts: Sequence[str]) -> torch.Tensor:
    """Return the prompt embeddings for the subject's router, (n, Z); without a router, zeros (n, 1)."""
    if subject.encoder is None:
        return torch.zeros(len(prompts), 1)
    return torch.as_tensor(subject.encoder.encode(list(prompts))).float()
