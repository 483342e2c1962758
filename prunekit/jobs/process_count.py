"""The number of processes that a command starts for a recipe: on a CPU, one per thread if the model is small."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import BaseModel

from prunekit.jobs.recipe import AnyRecipe, CompareRecipe, PretrainRecipe, PruneRecipe
from prunekit.models.names import DENOISERS, local_path
from prunekit.runtime.companions import COUNT, LAUNCHED
from prunekit.runtime.errors import UserError
from prunekit.training.trainer import TrainerConfig

MOST = 4  # largest default number of processes; each holds the model and the data
# Bytes of the weights of a small denoiser; a larger one gains from threads, and memory has no room for copies of it
SMALL = 200 * 2**20


def process_count(recipe: AnyRecipe | None) -> int:
    """Return the number of processes for a recipe: PRUNEKIT_PROCESSES, else one per thread (at most MOST).

    It is at most the smallest batch size. It is 1 without a recipe, under a launcher, on a Ray cluster and for
    pre-training; if PRUNEKIT_PROCESSES is not set, also on GPUs and for large models.

    Raises:
        UserError: PRUNEKIT_PROCESSES is not a positive number.

    """
    if recipe is None:
        return 1
    given = os.environ.get(COUNT, "").strip()
    if given and not (given.isdecimal() and int(given)):
        raise UserError(f"{COUNT}={given}: give a number of processes, 1 or more")
    if any(name in os.environ for name in LAUNCHED) or isinstance(recipe, PretrainRecipe):
        return 1
    if recipe.engine.kind != "local":
        return 1
    if given:
        return min(int(given), _smallest_batch(recipe))
    if torch.cuda.is_available() or not _is_small(recipe.model):
        return 1
    return min(torch.get_num_threads(), MOST, _smallest_batch(recipe))


def _smallest_batch(recipe: PruneRecipe | CompareRecipe) -> int:
    """Return the smallest batch size of all trainings; each process needs one sample of a batch."""
    settings = [recipe, *(recipe.method_of(label).config for label in recipe.methods)]
    return min(batch for model in settings for batch in _batches(model))


def _batches(model: BaseModel) -> Iterator[int]:
    if isinstance(model, TrainerConfig):
        yield model.batch_size
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _batches(value)


def _is_small(model: str | Path) -> bool:
    with suppress(UserError, OSError):  # an error of the model is reported when it is loaded
        path = local_path(model)
        if path is not None:
            files = [f for part in DENOISERS for f in path.glob(f"{part}/*.safetensors")] if path.is_dir() else [path]
            return sum(file.stat().st_size for file in files) <= SMALL
    return False
