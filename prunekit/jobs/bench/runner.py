"""Measure the rows of a benchmark, one file per row, so that a stopped benchmark can be resumed."""

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from prunekit.core.registry import denoiser_in, family_of, texts_of, with_denoiser
from prunekit.core.slicing import slice_model
from prunekit.core.space import Architecture
from prunekit.data.fingerprint import Fingerprint
from prunekit.jobs.bench.bench_models import (
    choose,
    dense_cost,
    kept_units,
    own_pipeline,
    random_pipeline,
    random_unet,
    read_unet,
)
from prunekit.jobs.bench.bench_recipe import BenchRecipe, CellConfig
from prunekit.jobs.bench.bench_rows import Piece, Row, Subject, row_of
from prunekit.jobs.bench.modes import in_mode
from prunekit.jobs.bench.workloads import denoiser_calls, pipeline_call
from prunekit.measuring.clock import peak_memory, timed_call, timed_inputs
from prunekit.measuring.environment import device_name, environment, folder_name
from prunekit.measuring.interleaved import WarmUp, measure
from prunekit.methods.budget import unaligned
from prunekit.models import load_shape, load_unet_on_meta
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import write_json
from prunekit.runtime.run_directory import DENSE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Bench:
    """A benchmark on one device: its rows, which of them are missing, and their measurement.

    directory: holds one folder per device, with one JSON file per row.
    Raises a one-line ValueError: a resolution that the model does not support, a missing device, or an unknown model.
    """

    def __init__(self, recipe: BenchRecipe, directory: Path, say: Callable[[str], Any] = print):
        self.recipe, self.directory, self.say = recipe, directory, say
        self.device = _device(recipe.device)
        self.environment = environment(self.device)
        self.folder = directory / folder_name(self.device)
        self.shape = load_shape(recipe.model)
        scale = self.shape.vae_scale_factor
        if recipe.resolution % scale:
            raise UserError(f"resolution={recipe.resolution}: {recipe.model} takes multiples of {scale} pixels")
        self.latent, self.text_length = recipe.resolution // scale, self.shape.text_length
        self._chosen: dict[str, Architecture] = {}

    @cached_property
    def pieces(self) -> list[Piece]:
        """All rows, cell by cell."""
        subjects = {name: self._subject(name) for name in (DENSE, *self.recipe.architectures)}
        return [
            Piece(self.recipe, cell, subjects[name], subjects[DENSE])
            for cell in self.recipe.cells
            for name in self.recipe.names(cell)
        ]

    def missing(self) -> list[Piece]:
        """Return the rows that are not measured yet on this device with its driver and versions."""
        return [piece for piece in self.pieces if piece.read(self.folder, self.environment) is None]

    def rows(self) -> list[Row]:
        """Return all finished rows, of every device in the directory, in the recipe's order."""
        folders = sorted(path for path in self.directory.glob("*") if path.is_dir())
        rows = [piece.read(folder) for folder in folders for piece in self.pieces]
        return [row for row in rows if row is not None]

    def run(self, minutes: float | None = None) -> bool:
        """Measure the missing rows; return whether all rows are measured.

        minutes: time limit; no row starts that would end later, judged by the longest row of its kind so far.
        """
        start, missing = time.monotonic(), self.missing()
        longest: dict[tuple[str, str, str], float] = {}
        total = len(self.pieces)
        self.say(f"{device_name(self.device)}: {total - len(missing)} of {total} rows are there")
        for cell in self.recipe.cells:
            todo = [piece for piece in missing if piece.cell == cell]
            kind = (cell.workload, cell.dtype, cell.mode)
            if not todo:
                continue
            with _Dense(self, cell) as dense:
                for piece in todo:
                    begun = time.monotonic()
                    if minutes is not None and begun - start + longest.get(kind, 0.0) > 60 * minutes:
                        return False
                    row = dense.row(piece)
                    write_json(piece.path(self.folder), row)
                    took = time.monotonic() - begun
                    longest[kind] = max(longest.get(kind, 0.0), took)
                    self.say(f"{piece.title}: {_summary(row)} ({took:.0f} s)")
        return True

    def architecture(self, name: str) -> Architecture | None:
        """Return an architecture chosen for a budget; None for the dense model and for a denoiser from a folder."""
        self.pieces  # noqa: B018 - chooses the architectures
        return self._chosen.get(name)

    def _subject(self, name: str) -> Subject:
        config = self.recipe.architectures.get(name)
        published = self.recipe.published_dense_seconds if config is None else config.published_seconds
        path = None if config is None else config.path
        if config is None or path is not None:
            model = denoiser_in(self.shape) if path is None else load_unet_on_meta(path)
            plain = sorted(item for item in model.config.items() if not item[0].startswith("_"))
            macs, params = dense_cost(model, self.latent, self.text_length)
            return Subject(name, macs, params, Fingerprint(plain).key(), None, published)
        architecture, cost = choose(config, denoiser_in(self.shape), self.latent, self.text_length, self.recipe.seed)
        self._chosen[name] = architecture
        digest = Fingerprint(architecture.space.to_dict()).add_tensor(architecture.canonical).key()
        counts = (cost.macs(architecture), cost.params(architecture))
        rest = None if config.align is None else unaligned(architecture, config.align)
        return Subject(name, *counts, digest, config.budget, published, kept_units(architecture), rest)


class _Dense:
    """The dense model of a cell on the device, in the cell's mode inside the context; it measures the cell's rows."""

    def __init__(self, bench: Bench, cell: CellConfig):
        self.bench, self.recipe, self.cell, self.stack = bench, bench.recipe, cell, ExitStack()
        dtype = DTYPES[cell.dtype]
        self.pipeline: DiffusionPipeline | None = None
        if self.recipe.weights == "own":
            self.pipeline = own_pipeline(self.recipe.model, bench.device, dtype)
            self.model = denoiser_in(self.pipeline)
        else:
            self.model = random_unet(self.recipe.model, bench.device, dtype, self.recipe.seed)
            if cell.workload != "unet":
                self.pipeline = random_pipeline(self.model, self.recipe.seed)
        self._lay_out(self.model)
        family = family_of(self.model)
        self.batch = family.call_batch(
            self.recipe.batch, texts_of(self.pipeline or self.model, self.recipe.guidance) > 1
        )
        self.inputs = timed_inputs(self.model, self.batch, bench.latent, bench.text_length, self.recipe.seed)
        if cell.memory_format == "channels_last":
            self.inputs = self.inputs.map(_channels_last)

    def __enter__(self) -> "_Dense":
        self.stack.enter_context(torch.no_grad())
        self.call = self._call(self.model, self.stack)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def row(self, piece: Piece) -> Row:
        """Measure one row: the architecture against the dense model, and the dense model against itself."""
        recipe, bench = self.recipe, self.bench
        with ExitStack() as stack, torch.no_grad():
            model, calls = self.model, {DENSE: self.call}
            if piece.subject.name != DENSE:
                model = self._pruned(piece.subject.name)
                calls[piece.subject.name] = self._call(model, stack)
            warm_up = WarmUp(max_seconds=recipe.warmup_seconds)
            measured = measure(calls, piece.cell.repeats, bench.device, warm_up, recipe.seed)
            function = calls[piece.subject.name]
            finite = bool(torch.isfinite(function()).all())
            facts = {
                "unet_batch": self.batch,
                "unet_calls": 1 if self.cell.workload == "unet" else denoiser_calls(self.pipeline, recipe.steps),
                "latent": [bench.latent, bench.latent],
                "text_length": bench.text_length,
                "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
                "peak_bytes": peak_memory(function, bench.device),
                "is_finite": finite,
            }
        del model, calls, function
        _free(bench.device)
        return row_of(piece, measured, facts, bench.environment)

    def _pruned(self, name: str) -> ModelMixin:
        config, architecture = self.recipe.architectures[name], self.bench.architecture(name)
        if architecture is not None:
            model = slice_model(self.model, architecture)
        else:
            assert config.path is not None
            model = read_unet(config.path, self.bench.device, DTYPES[self.cell.dtype])
        return self._lay_out(model)

    def _lay_out(self, model: ModelMixin) -> ModelMixin:
        if self.cell.memory_format == "channels_last":
            model.to(memory_format=torch.channels_last)
        return model

    def _call(self, model: ModelMixin, stack: ExitStack) -> Callable[[], Any]:
        recipe, cell = self.recipe, self.cell
        stack.enter_context(in_mode(model, cell.mode, self.inputs))
        if cell.workload == "unet":
            return timed_call(model, self.inputs)
        pipeline = with_denoiser(self.pipeline, model)
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)  # own scheduler
        shape = (recipe.resolution, recipe.batch, recipe.guidance, recipe.steps)
        return pipeline_call(pipeline, cell.workload, *shape, stack, recipe.seed)


def _device(name: str) -> torch.device:
    is_there = torch.cuda.is_available()
    if name == "cuda" and not is_there:
        raise UserError("device=cuda: torch sees no CUDA device here; choose device=cpu, or auto")
    return torch.device("cuda" if is_there and name != "cpu" else "cpu")


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _summary(row: Row) -> str:
    text = f"p50 {1e3 * row['p50']:.1f} ms of {row['count']}"
    if row["latency_ratio"] is not None:
        ratio = row["latency_ratio"]
        text += f", {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] of dense"
        text += f", {row['latency_per_mac']:.3f} per MAC"
    return f"{text}, noise ±{row['noise_floor']:.1%}" + (", NOT FASTER" if row["not_faster"] else "")
