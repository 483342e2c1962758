"""`prunekit export`: write a run, a pipeline or a denoiser in the tier that fits, checked in a fresh process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from prunekit.core.cost import CostModel
from prunekit.core.discovery import discover
from prunekit.core.registry import part_of
from prunekit.core.timesteps import TimestepModel, saved_parts
from prunekit.export.card import CARD, model_card
from prunekit.export.folding import Folded, FoldingPlan
from prunekit.export.graphs import check_onnx, save_graph
from prunekit.export.inputs import MOST_TOKENS, Inputs
from prunekit.export.model_folder import load_denoiser
from prunekit.export.original_layout import save_single_file
from prunekit.export.pipeline_parts import save_pipeline
from prunekit.export.tiers import ALONE, GRAPHS, SINGLE_FILE, check_tier, save_denoiser
from prunekit.export.verification import Claim, Expected, claims_of, verify
from prunekit.models.hub import INDEX
from prunekit.models.names import DENOISERS
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, staged
from prunekit.runtime.run_directory import RECIPE, RESULTS
from prunekit.serving.experts_folder import ROUTED
from prunekit.serving.pipeline import PromptRoutedPipeline
from prunekit.serving.prompts import read_prompts, shipped_prompts
from prunekit.serving.routed_directory import write_shared

HELD_OUT = 5  # one in this number of prompts measures the error of folding to a rank
GRAPH_BATCHES = (1, 3)  # batch sizes that check a graph for any batch size


@dataclass
class Exported:
    """A finished export.

    directory: the export's directory. tiers: tier of each denoiser.
    checked: for each check, how the export was opened and by how much its output differed.
    """

    directory: Path
    tiers: list[str]
    checked: list[dict[str, Any]]


@dataclass
class _Work:
    """An export under way: what to save, what was saved, and what must be checked."""

    tier: str
    batch: int | None
    text_length: int
    folding: FoldingPlan | None = None
    prompts: list[str] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    @property
    def use(self) -> str:
        """Key of the model card's USES for a denoiser that is saved without a pipeline; "" for the other tiers."""
        return "graph" if self.tier in GRAPHS else self.tier if self.tier in ALONE else ""

    def folded(self, pipeline: PromptRoutedPipeline, model: ModelMixin, what: str) -> tuple[ModelMixin, Folded | None]:
        """Fold an expert's modulation layers if requested; return the model to save, and the folding or None.

        what: the expert's name in reports and errors.
        """
        if self.folding is None:
            return model, None
        if isinstance(model, TimestepModel):
            raise UserError(f"{what} is several slices, one for each bin of timesteps: they are not folded")
        prompts = [*shipped_prompts("aptp-cc3m"), *shipped_prompts("aptp-coco")]
        held_out = shipped_prompts("aptp-parti")
        if self.prompts is not None:
            held_out = self.prompts[::HELD_OUT]
            prompts = [text for index, text in enumerate(self.prompts) if index % HELD_OUT]
        stock = pipeline.parts.pipeline(model)
        folded = self.folding.fold(stock, pipeline.mixture.guidance, prompts, held_out)
        self.notes.append(f"{what.capitalize()}: {folded.summary}")
        return folded.model, folded

    def save(self, model: ModelMixin, folder: Path, what: str) -> None:
        """Save a denoiser, or each of its slices for bins of timesteps, to a folder.

        what: the denoiser's name in reports.
        """
        if isinstance(model, TimestepModel):
            for index, (part, place) in enumerate(saved_parts(model, folder)):
                self.save(part, place, f"{what}, slice {index}")
            return
        if self.tier in GRAPHS:
            specification = save_graph(model, folder, self.tier, self.batch, self.text_length)
        elif self.tier == SINGLE_FILE:
            specification = save_single_file(model, folder)
        else:
            specification = save_denoiser(model, folder, self.tier)
        self.saved(model, folder, what, specification)

    def saved(self, model: ModelMixin, folder: Path, what: str, specification: Mapping[str, Any]) -> Expected:
        """Record a saved denoiser's checks, tier and costs; return the outputs of the denoiser in memory."""
        tier = specification["tier"]
        batches = (self.batch,) if self.batch else GRAPH_BATCHES
        expected = Expected.of(model, self.text_length, batches if tier in GRAPHS else (2,))
        self.claims += claims_of(tier, folder, what, expected)
        cost = CostModel(model, discover(model, "none"), text_length=self.text_length)
        self.rows.append({"tier": tier, "macs": cost.dense_macs, "params": cost.dense_params})
        return expected


def export(
    source: str | Path,
    directory: str | Path,
    tier: str = "auto",
    method: str | None = None,
    expert: int | None = None,
    batch: int | None = None,
    fold_modulation: str | None = None,
    prompts_file: Path | None = None,
) -> Exported:
    """Export a run, a pipeline or a denoiser; return the export's directory, its tiers and the results of its checks.

    Args:
        source: directory of a run, a saved `PromptRoutedPipeline` or a diffusers pipeline, or a denoiser's folder.
        directory: new or empty; it appears, with a model card, once every check has passed.
        tier: "stock", "class", "single-file", "onnx", "torch", or "auto": "stock" if it can express the cut, else
            "class".
        method: method of the run; by default the method that routes, else the first by name.
        expert: index of an expert to export alone, as a plain pipeline; by default all experts, with their router.
        batch: samples per call of the tiers "onnx" and "torch"; by default any number.
        fold_modulation: how to fold a transformer's modulation layers: "table=N", "nearest=N" or "rank=R", see
            `FoldingPlan.parse`; by default the layers stay as they are.
        prompts_file: for "rank=R": typical prompts of the model, one per line. Four fifths of them determine the
            directions that are kept, and one fifth measures the error. By default the shipped lists, 32 and 20 prompts.

    Raises:
        ValueError: the source is faulty, the directory is in use, the tier does not fit, or a check fails.
        FileNotFoundError: `source` holds no model.
        ImportError: the packages of the tier "onnx" are missing.

    """
    source, directory = Path(source), Path(directory)
    check_tier(tier)
    if tier == "onnx":
        check_onnx()
    if batch is not None and (tier not in GRAPHS or batch < 1):
        raise UserError(f"batch={batch} is for the tiers {' and '.join(GRAPHS)}, and at least 1")
    folding = None if fold_modulation is None else FoldingPlan.parse(fold_modulation)
    if folding is not None and tier not in ("auto", "class"):
        raise UserError(f"a model with folded modulation layers is of tier class, not {tier}")
    prompts = None if prompts_file is None else read_prompts(prompts_file)
    if prompts is not None and (folding is None or folding.kind != "rank" or len(prompts) < HELD_OUT):
        raise UserError(f"a prompts file is for fold_modulation=rank=R, and holds at least {HELD_OUT} prompts")
    if (source / "config.json").is_file() and not any((source / name).is_file() for name in (RECIPE, ROUTED, INDEX)):
        if folding is not None:
            raise UserError("folding runs a pipeline's text encoders and sampler: give a run or a pipeline's directory")
        return _export_denoiser(source, directory, _Work(tier, batch, MOST_TOKENS))
    pipeline = PromptRoutedPipeline.from_pretrained(source, method, device="cpu", max_resident=1)
    work = _Work(tier, batch, pipeline.text_length, folding, prompts)
    table = _table(source)
    if expert is not None or pipeline.num_experts == 1:
        with pipeline.mixture.experts.use(expert or 0) as model:
            is_sliced = isinstance(model, TimestepModel)
        if is_sliced and expert is not None:
            raise UserError(f"expert={expert} consists of several slices, one per bin of timesteps: export all experts")
        if is_sliced:  # no stock class selects by timestep
            return _export_all(pipeline, directory, work, table)
        return _export_one(pipeline, expert or 0, directory, work, table)
    return _export_all(pipeline, directory, work, table)


def _export_denoiser(source: Path, directory: Path, work: _Work) -> Exported:
    model = load_denoiser(source, torch.float32)
    with staged(directory) as folder:
        work.save(model, folder, DENOISERS[part_of(model)])
        return _finish(folder, directory, work, work.use or "denoiser", part_of(model), {}, ())


def _export_one(
    pipeline: PromptRoutedPipeline, index: int, directory: Path, work: _Work, table: Sequence[Mapping[str, Any]]
) -> Exported:
    with staged(directory) as folder, pipeline.mixture.experts.use(index) as model:
        part = pipeline.parts.denoiser
        what = DENOISERS[part]
        if work.use:
            work.save(model, folder, what)
            use = work.use
        else:
            model, folded = work.folded(pipeline, model, what)
            specification = save_pipeline(pipeline.parts, model, folder, work.tier)
            if folded is not None:
                folded.save(folder / part)
            expected = work.saved(model, folder / part, what, specification)
            work.claims.append(Claim("pipeline", "pipeline", folder, expected, with_prunekit=False))
            use = specification["tier"]
        return _finish(folder, directory, work, use, pipeline.parts.denoiser, pipeline.mixture.info, table)


def _export_all(
    pipeline: PromptRoutedPipeline, directory: Path, work: _Work, table: Sequence[Mapping[str, Any]]
) -> Exported:
    with staged(directory) as folder:
        for index in range(pipeline.num_experts):
            with pipeline.mixture.experts.use(index) as expert:
                place, what = folder / "experts" / str(index), f"expert {index}"
                model, folded = work.folded(pipeline, expert, what)
                work.save(model, place, what)
                if folded is not None:
                    folded.save(place)
            del expert
            del model  # or it would stay in memory while the next one is loaded
        use = work.use
        if not use:
            is_one_pipeline = write_shared(pipeline.parts, pipeline.mixture, folder)
            use, routes = "routed" if is_one_pipeline else "sliced", _routes(pipeline)
            work.claims.append(Claim("routed", "router", folder, routes, with_prunekit=True))
            if is_one_pipeline:
                work.claims.append(Claim("mixture", "router", folder, routes, with_prunekit=False))
        return _finish(folder, directory, work, use, pipeline.parts.denoiser, pipeline.mixture.info, table)


def _routes(pipeline: PromptRoutedPipeline) -> Expected:
    """Return prompts as bytes, and each prompt's expert index plus 1, so that no expected value is zero."""
    prompts = ["", *shipped_prompts("aptp-coco")]
    text = torch.frombuffer(bytearray("\n".join(prompts).encode()), dtype=torch.uint8)
    return Expected([(Inputs({"prompts": text}, {}, {}, frozenset()), pipeline.route(prompts).double() + 1)])


def _finish(
    folder: Path,
    directory: Path,
    work: _Work,
    use: str,
    part: str,
    info: Mapping[str, Any],
    table: Sequence[Mapping[str, Any]],
) -> Exported:
    """Check all claims of the export, write the model card, and return the finished export."""
    checked = verify(work.claims)
    card = model_card(use, directory.name, info, work.rows, checked, table, part, work.notes)
    (folder / CARD).write_text(card, encoding="utf-8")
    return Exported(directory, [row["tier"] for row in work.rows], checked)


def _table(source: Path) -> list[dict[str, Any]]:
    """Return the table rows of a run's results; [] if the run has no results."""
    path = source / RESULTS
    return read_json(path)["table"]["rows"] if path.is_file() else []
