"""The recipe of a benchmark (`job: bench`): which architectures of a model are timed, and how."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prunekit.jobs.bench.modes import Mode
from prunekit.runtime.errors import UserError, plain_name
from prunekit.runtime.run_directory import DENSE
from prunekit.runtime.yaml_files import FAULTS, load_overrides, load_settings, merged, read_mapping, resolved

JOB = "bench"
REDUCED = {"resolution": 256, "batch": 1, "guidance": 1.0, "steps": 2, "warmup_seconds": 10.0}
REDUCED_REPEATS = 3


class BenchRecipeError(UserError):
    """A benchmark's recipe that cannot be used; the message is one line that says what to change."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ArchitectureConfig(_Section):
    """One pruned denoiser, chosen for a budget without data or read from a folder."""

    budget: float | None = Field(
        None, gt=0, lt=1, description="Fraction of the dense model's exact MACs at `resolution`."
    )
    choose: Literal["random", "width", "depth"] = Field(
        "random",
        description="Units to remove, by random scores. random: widths, and the layers that are units "
        "under depth=aptp; width: widths only; depth: whole layers (depth=all), and widths "
        "only where necessary.",
    )
    align: Literal[8, 16, 32, 64] | None = Field(
        None, description="Every cut width is a multiple of this number of channels; unset: any width."
    )
    path: str | None = Field(None, description="In place of a budget: folder of a pruned or stock denoiser.")
    published_seconds: float | None = Field(None, gt=0, description="Published seconds per image; unset: none.")

    @model_validator(mode="after")
    def _one_source(self) -> "ArchitectureConfig":
        if (self.budget is None) == (self.path is None):
            raise UserError("an architecture has either a budget or a path")
        if self.path is not None and self.align is not None:
            raise UserError("align goes with a budget: the widths of a denoiser at a path are what they are")
        return self


class CellConfig(_Section):
    """One way to run the architectures, with one row per architecture."""

    workload: Literal["unet", "sampling", "image"] = Field(
        description="Timed work. unet: one call; sampling: the pipeline's loop with all calls and the "
        "scheduler; image: a whole pipeline call with text encoder and decoder."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mode: Mode = "eager"
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    repeats: int = Field(30, gt=0, description="Number of samples per arm, after warm-up.")
    architectures: list[str] | None = Field(None, description="Names of the architectures; unset: all.")


class BenchRecipe(_Section):
    """Time a model and pruned forms of it, interleaved, on this machine's device."""

    job: Literal["bench"]
    name: Annotated[str, AfterValidator(lambda text: plain_name(text, "name"))] = Field(
        description="Name of the results' directory."
    )
    seed: int = Field(0, ge=0, description="Seed of weights, scores, inputs and the order of the arms.")
    model: str = Field("sd-2.1", description="Model: sd-1.4, sd-1.5, sd-2.1, …, or a diffusers directory.")
    weights: Literal["random", "own"] = Field(
        "random", description="Weights. random: drawn from the model's configs, sufficient for times; own: loaded."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device: auto (a GPU if there is one), cpu or cuda."
    )
    resolution: int = Field(768, gt=0, le=2**14, description="Side of pictures in pixels.")
    batch: int = Field(1, gt=0, description="Images per pipeline call.")
    guidance: float = Field(
        7.5, ge=0, description="Scale of classifier-free guidance; above 1 the denoiser's batch is doubled."
    )
    steps: int = Field(
        25, gt=0, description="Number of scheduler steps; PNDM calls the denoiser once more than it has steps."
    )
    warmup_seconds: float = Field(
        60.0, gt=0, description="Largest duration of the warm-up in seconds, whether or not times have settled."
    )
    published: str | None = Field(None, description="Meaning and source of the architectures' published_seconds.")
    published_dense_seconds: float | None = Field(
        None, gt=0, description="Published seconds of the dense model, from the same source."
    )
    architectures: dict[str, ArchitectureConfig] = Field(
        {}, description="Architectures by name; `dense` is always included."
    )
    cells: list[CellConfig] = Field(
        min_length=1, description="Cells: how the architectures are run, one after another."
    )

    @field_validator("architectures")
    @classmethod
    def _not_dense(cls, architectures: dict[str, ArchitectureConfig]) -> dict[str, ArchitectureConfig]:
        if DENSE in architectures:
            raise UserError(f"architectures.{DENSE} is the model itself and always there; choose another name")
        return architectures

    @model_validator(mode="after")
    def _known_names(self) -> "BenchRecipe":
        known = (DENSE, *self.architectures)
        for cell in self.cells:
            if unknown := [name for name in cell.architectures or () if name not in known]:
                raise UserError(f"cells name the architecture {unknown[0]!r}; there are {', '.join(known)}")
        return self

    def names(self, cell: CellConfig) -> list[str]:
        """Return the names of a cell's architectures, the dense model first if the cell has it."""
        return [
            name for name in (DENSE, *self.architectures) if cell.architectures is None or name in cell.architectures
        ]


def reduced(recipe: BenchRecipe) -> BenchRecipe:
    """Return the same benchmark small enough for a CPU: latents of 32 x 32, batch 1, two steps, eager, few repeats."""
    cells: list[CellConfig] = []
    for cell in recipe.cells:
        small = cell.model_copy(update={"mode": "eager", "repeats": REDUCED_REPEATS})
        if small not in cells:
            cells.append(small)
    return recipe.model_copy(update={**REDUCED, "cells": cells, "name": f"{recipe.name}_reduced"})


def is_benchmark(path: str | Path) -> bool:
    """Return whether a YAML file is a benchmark's recipe (job: bench)."""
    try:
        return read_mapping(Path(path)).get("job") == JOB
    except UserError:
        return False


def load_bench_recipe(path: str | Path, overrides: Iterable[str] = ()) -> BenchRecipe:
    """Read a benchmark's YAML recipe and apply `key=value` overrides (dotted keys).

    Raises a one-line BenchRecipeError: a missing file, bad YAML, an unknown key or a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        raise BenchRecipeError(f"no recipe at {path}; the folder recipes/ of the repository has bench_*.yaml")
    try:
        content = resolved(merged(load_settings(path), load_overrides(overrides)), path)
    except UserError as error:
        raise BenchRecipeError(str(error)) from error
    except FAULTS as error:
        raise BenchRecipeError(f"{path} cannot be read: {error}") from error
    if content.get("job") != JOB:
        raise BenchRecipeError(f"{path} is not a benchmark: it has no job: {JOB}")
    try:
        return BenchRecipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "recipe"
        message = first["msg"].removeprefix("Value error, ")
        allowed = f" (allowed: {', '.join(BenchRecipe.model_fields)})" if first["type"] == "extra_forbidden" else ""
        raise BenchRecipeError(f"{path}: {where}: {message}{allowed}") from error
