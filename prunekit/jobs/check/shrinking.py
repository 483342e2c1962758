"""Shrink a recipe for a check: equal batches, resolutions and precisions, but at most two steps, on a few pairs."""

import io
import itertools
import tarfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prunekit.data.config import READERS, DataConfig, load_data
from prunekit.data.images import CaptionedImages
from prunekit.data.samples import collect
from prunekit.jobs.recipe import CompareRecipe, PruneRecipe
from prunekit.recovery.closed_form import ClosedFormConfig
from prunekit.runtime.tracking import TrackingConfig
from prunekit.training.memory import STEPS, two_steps

HELD_OUT = 0.25  # held-out share of the few captions, for the evaluation


def first_images(config: DataConfig, seed: int, pairs: int) -> CaptionedImages:
    """Read the first pictures of a recipe's data, with at least `pairs` captions if there are that many.

    Only the emoji data and tables are read completely. Bad samples are left out, whatever their share: a few samples do
    not show the share in the whole data. Other errors are those of `load_data`.
    """
    if config.kind == "emoji" or config.path is None or not Path(config.path).expanduser().exists():
        return load_data(config, seed)
    path = Path(config.path).expanduser()
    pairs_read, pictures = READERS[config.kind](config, path)
    tolerance = config.model_copy(update={"max_bad_share": 1.0, "report": None}).tolerance
    return collect(
        itertools.islice(pairs_read, pairs),
        pictures,
        tolerance,
        str(path),
        verify=True,
        seed=seed,
        holdout_by=config.holdout_by,
    )


def write_shard(images: CaptionedImages, pairs: int, path: Path) -> DataConfig:
    """Write the first pairs as one WebDataset shard, one picture per caption; return the config that reads it."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as archive:
        for pair, image in enumerate(images.image_index[:pairs].tolist()):
            for suffix, content in (("jpg", images.encoded[image]), ("txt", images.captions[pair].encode())):
                entry = tarfile.TarInfo(f"{pair:06d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    path_and_share: Any = {"path": str(path.parent), "holdout": HELD_OUT, "holdout_by": images.holdout_by}
    return DataConfig(kind="webdataset", max_bad_share=1.0, **path_and_share)


def shrunk(
    recipe: PruneRecipe | CompareRecipe, data: DataConfig, devices: int = 1, tuning_devices: int = 1
) -> PruneRecipe | CompareRecipe:
    """Return the recipe on other data, with two steps of every training and one batch of pictures.

    devices, tuning_devices: number of devices that share a batch of a search and of a fine-tuning in the whole recipe;
        a forward pass of the check has the samples of one device.
    """
    evaluation = recipe.evaluation
    pictures = max(2, min(evaluation.batch_size, evaluation.num_images))
    settings = {label: _settings(recipe, label, devices) for label in recipe.methods}
    changes: dict[str, Any] = {
        "data": data,
        "cache": recipe.cache.model_copy(update={"directory": None}),
        "tracking": TrackingConfig(),
        "methods": settings,
        "fine_tune": two_steps(recipe.fine_tune, tuning_devices),
        "evaluation": evaluation.model_copy(
            update={"num_images": pictures, "steps": STEPS, "num_predictions": pictures, "at_steps": []}
        ),
    }
    if recipe.recover.closed_form is not None:
        changes["recover"] = recipe.recover.model_copy(update={"closed_form": short_refit(recipe.recover.closed_form)})
    if isinstance(recipe, CompareRecipe):
        left, budgets = list(recipe.methods), []
        for entry in recipe.budgets:
            methods = [label for label in entry.methods or recipe.methods if label in left]
            left = [label for label in left if label not in methods]
            if methods:
                budgets.append(entry.model_copy(update={"seeds": entry.seeds[:1], "methods": methods}))
        changes |= {"budgets": budgets, "protocols": ["equal_steps"]}
    return recipe.model_copy(update=changes)


def _settings(recipe: PruneRecipe | CompareRecipe, label: str, devices: int) -> dict[str, Any]:
    """Return a row's settings with the changes that make its method short."""
    short = recipe.method_of(label).short_settings(devices)
    dumped = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in short.items()}
    settings = {**(recipe.methods[label] or {}), **dumped}
    if isinstance(recipe, CompareRecipe) and "closed_form" in settings:
        refitting = recipe.recovering(label).closed_form
        settings["closed_form"] = False if refitting is None else short_refit(refitting).model_dump()
    return settings


def short_refit(config: ClosedFormConfig) -> ClosedFormConfig:
    """Return the settings of a refit on one batch of samples."""
    return config.model_copy(update={"samples": min(config.samples, max(2, config.batch_size))})
