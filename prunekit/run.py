"""A run: the stages of a recipe in order, in one directory, each skipped where its result is there already.

A stage's result appears whole or not at all, and every draw is keyed by the recipe's seed; so a run that was killed
anywhere goes on where it was and ends where it would have ended (law 5).
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich.console import Console

from prunekit.cost import CostModel
from prunekit.data.config import load_data
from prunekit.data.encoded import EncodedData, encode
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.evaluation import comparison
from prunekit.evaluation.agreement import agreement_samples, predictions
from prunekit.evaluation.ceiling import evaluator_ceiling
from prunekit.evaluation.comparison import Candidate, EvaluationSet, Sampling
from prunekit.evaluation.evaluator import load_evaluator
from prunekit.evaluation.pictures import PictureRow, expert_note, picture_sheet
from prunekit.evaluation.table import (
    CEILING_COLUMNS,
    COLUMNS,
    EXPERT_COLUMNS,
    json_table,
    markdown_table,
    terminal_table,
)
from prunekit.methods.base import PruneResult, space_and_cost
from prunekit.models import load_pipeline, quiet_libraries
from prunekit.recipe import PretrainRecipe, PruneRecipe, RecipeError, dump_recipe, load_recipe
from prunekit.slicing import PrunedUNet2DConditionModel, slice_unet
from prunekit.training.checkpoint import Checkpoints, append_row, read_json, write_folder, write_json
from prunekit.training.diffusion import forward_process
from prunekit.training.fine_tuning import fine_tune
from prunekit.training.progress import console
from prunekit.units import Architecture

RECIPE = "recipe.yaml"


class Run:
    """One recipe's directory, log and stages."""

    def __init__(self, recipe: PruneRecipe, directory: Path):
        self.recipe, self.directory = recipe, directory
        self.started = time.monotonic()

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to `log.jsonl`."""
        append_row(self.directory / "log.jsonl", row)

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        seconds = time.monotonic() - self.started
        console.print(f"[{int(seconds // 60):3d}:{int(seconds % 60):02d}] {text}", highlight=False, markup=False)
        self.log({"event": text, "seconds": round(seconds, 1)})

    def execute(self) -> Path:
        """Run every stage that is not done; print the table; return the directory."""
        recipe = self.recipe
        quiet_libraries()
        self.say(f"{recipe.name}: {self.directory}")
        pipeline, data = self.load()
        scale = pipeline.vae_scale_factor
        resolution = recipe.resolution or pipeline.unet.config.sample_size * scale
        encoder = load_prompt_encoder(recipe.prompt_encoder)
        encoded = encode(pipeline, data, encoder, resolution, self.directory / "cache" / "encoded.safetensors")
        self.say(f"{data.num_images:,} images, {data.num_pairs:,} captions ({int(data.held_out.sum()):,} held out)")
        results = {name: self.prune(name, pipeline, encoded) for name in recipe.methods}
        candidates = [self.dense(pipeline)]
        candidates += [self.recover(name, result, pipeline, encoded) for name, result in results.items()]
        return self.compare(candidates, pipeline, encoded, encoder, resolution)

    def load(self) -> tuple[DiffusionPipeline, Any]:
        """Load the model and the data."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = load_pipeline(self.recipe.model).to(device)
        data = load_data(self.recipe.data, self.recipe.seed)
        return pipeline, data

    def prune(self, name: str, pipeline: DiffusionPipeline, data: EncodedData) -> PruneResult:
        """Choose a method's architectures, or read what an earlier start chose."""
        folder = self.directory / "methods" / name
        if (folder / "result.json").is_file():
            return PruneResult.load(folder, pipeline.unet)
        method = self.recipe.method(name)
        started = time.monotonic()
        result = method.prune(pipeline, data, folder, log=self.log)
        ratio = result.info.get("mixture_ratio", result.info["ratio"][0])
        self.say(f"{name}: {len(result.architectures)} architecture(s) at {ratio:.4f} of the dense MACs")
        self.log({"stage": name, "seconds": time.monotonic() - started, **{"ratio": ratio}})
        return result

    def dense(self, pipeline: DiffusionPipeline) -> Candidate:
        """Return the unpruned model as the table's first row."""
        cost = self.cost(pipeline)
        return Candidate("dense", [pipeline.unet], [cost.dense_macs], [cost.dense_params])

    def cost(self, pipeline: DiffusionPipeline) -> CostModel:
        """Return what counts the exact MACs of the table."""
        return space_and_cost(pipeline, self.recipe.prune.model_copy(update={"convention": "exact"}))[1]

    def recover(self, name: str, result: PruneResult, pipeline: DiffusionPipeline, data: EncodedData) -> Candidate:
        """Slice and fine-tune a method's architectures, each on the prompts routed to it."""
        pairs, cost = data.training_pairs(), self.cost(pipeline)
        routed = None if result.router is None else result.router.route(data.prompts[pairs])
        folder, unets = self.directory / "methods" / name / "experts", []
        seconds = float(result.info.get("search", {}).get("seconds", 0.0))
        for index, architecture in enumerate(result.architectures):
            own = pairs if routed is None else pairs[routed == index]
            unet, spent = self.expert(folder / str(index), f"{name} {index}", architecture, pipeline, data, own)
            unets.append(unet)
            seconds += spent
        macs = [cost.macs(architecture) for architecture in result.architectures]
        params = [cost.params(architecture) for architecture in result.architectures]
        return Candidate(name, unets, macs, params, result.router, seconds)

    def expert(
        self,
        folder: Path,
        title: str,
        architecture: Architecture,
        pipeline: DiffusionPipeline,
        data: EncodedData,
        pairs: torch.Tensor,
    ) -> tuple[PrunedUNet2DConditionModel, float]:
        """Return one fine-tuned expert and the seconds that it took; an expert without prompts stays as sliced."""
        unet, device = folder / "unet", pipeline.unet.device
        if not unet.is_dir():
            student = slice_unet(pipeline.unet, architecture).to(device)
            figures: dict[str, float] = {"steps": 0, "seconds": 0.0}
            if len(pairs):
                config, seed = self.recipe.fine_tune, self.recipe.seed
                options = {
                    "scheduler": pipeline.scheduler,
                    "pairs": pairs,
                    "seed": seed,
                    "title": title,
                    "log": self.log,
                }
                figures = fine_tune(student, pipeline.unet, data, config, folder / "checkpoints", **options)
            write_json(folder / "figures.json", figures)
            write_folder(unet, student.save_pretrained)
            Checkpoints(folder / "checkpoints").clear()
            self.say(f"{title}: fine-tuned on {len(pairs):,} captions")
        student = PrunedUNet2DConditionModel.from_pretrained(unet).to(device).eval()
        return student.requires_grad_(False), float(read_json(folder / "figures.json")["seconds"])

    def compare(
        self,
        candidates: list[Candidate],
        pipeline: DiffusionPipeline,
        data: EncodedData,
        encoder: Any,
        resolution: int,
    ) -> Path:
        """Generate and measure every row; write and print `results.json`, `table.md` and `comparison.png`."""
        recipe, settings = self.recipe, self.recipe.evaluation
        evaluator = load_evaluator(recipe.evaluator)
        prompts = EvaluationSet.build(data.images, settings.num_images, recipe.seed, evaluator, encoder, resolution)
        sampling = Sampling(settings.steps, settings.guidance, settings.batch_size)
        samples = agreement_samples(
            data.latents[data.image_index], data.text, forward_process(pipeline.scheduler), recipe.seed,
            settings.num_predictions,
        )  # fmt: skip
        reference = predictions(pipeline.unet, samples)
        rows, sheets, experts_of = [], [], {}
        chosen = torch.arange(min(settings.num_pictures, prompts.num_names))
        for candidate in candidates:
            pictures, experts = comparison.sample(
                candidate, pipeline, prompts, sampling, self.directory / "samples" / candidate.name
            )
            row = self.figures(
                candidate, pictures, experts, prompts, evaluator, data, samples, reference, candidates[0]
            )
            notes = [expert_note(int(experts[i]), candidate.macs[int(experts[i])]) for i in chosen]
            sheets.append(PictureRow(candidate.name, pictures[chosen], notes if candidate.router else None))
            row["seconds_per_image"] = self.timing(candidate, pipeline, prompts, sampling)
            rows.append(row)
            if candidate.router is not None:
                experts_of[candidate.name] = comparison.expert_rows(candidate, experts, data, prompts, candidates[0])
        ceiling = evaluator_ceiling(evaluator, data.images, pipeline.vae, resolution, recipe.seed)
        self.write(rows, experts_of, [{"name": name, **figures} for name, figures in ceiling.items()])
        captions = [prompts.prompts[i] for i in chosen]
        picture = picture_sheet(
            self.directory / "comparison.png", sheets, captions, f"{recipe.name}: same prompts and seeds"
        )
        self.say(f"table: {self.directory / 'table.md'}")
        self.say(f"picture: {picture}")
        return self.directory

    def figures(self, candidate: Candidate, *arguments: Any) -> dict[str, Any]:
        """Return a row's figures, measured once."""
        path = self.directory / "metrics" / f"{candidate.name}.json"
        if not path.is_file():
            write_json(path, comparison.measure(candidate, *arguments))
        return read_json(path)

    def timing(self, candidate: Candidate, *arguments: Any) -> float:
        """Return a row's seconds per image, measured once (kept apart: it is the one figure that differs by run)."""
        path = self.directory / "metrics" / f"{candidate.name}.timing.json"
        if not path.is_file():
            write_json(path, {"seconds_per_image": comparison.seconds_per_image(candidate, *arguments)})
        return float(read_json(path)["seconds_per_image"])

    def write(self, rows: list[dict], experts: dict[str, list[dict]], ceiling: list[dict]) -> None:
        """Write the tables as JSON and Markdown, and print them."""
        content = {"recipe": self.recipe.name, "seed": self.recipe.seed, "table": json_table(rows)}
        content |= {"experts": {name: json_table(e, EXPERT_COLUMNS) for name, e in experts.items()}}
        content |= {"evaluator": json_table(ceiling, CEILING_COLUMNS)}
        write_json(self.directory / "results.json", content)
        screen, parts = Console(highlight=False), [f"# {self.recipe.name}\n"]
        tables = [(None, rows, COLUMNS)]
        tables += [(f"Experts of {name}", own, EXPERT_COLUMNS) for name, own in experts.items()]
        tables += [("What the evaluator says of known pictures", ceiling, CEILING_COLUMNS)]
        for title, content, columns in tables:
            parts += [f"## {title}\n"] if title else []
            parts += [markdown_table(content, columns)]
            screen.print(terminal_table(content, columns, title or self.recipe.name, screen.width))
        (self.directory / "table.md").write_text("\n".join(parts), encoding="utf-8")


def start(recipe_path: str | Path, overrides: Iterable[str] = (), directory: str | Path | None = None) -> Path:
    """Run a recipe from its file; return the run directory (`runs/NAME` by default).

    A directory that holds the same recipe's run is resumed. Raises RecipeError where it holds another's.
    """
    recipe = load_recipe(recipe_path, overrides)
    folder = Path(directory or Path("runs") / recipe.name)
    _claim(folder, recipe)
    return _execute(recipe, folder)


def resume(directory: str | Path) -> Path:
    """Go on with the run in `directory`; return it. Raises RecipeError where there is none."""
    folder = Path(directory)
    if not (folder / RECIPE).is_file():
        raise RecipeError(f"{folder} is no run directory: it has no {RECIPE}; start one with `prunekit run RECIPE`")
    return _execute(load_recipe(folder / RECIPE), folder)


def _execute(recipe: PruneRecipe | PretrainRecipe, folder: Path) -> Path:
    if isinstance(recipe, PretrainRecipe):
        from prunekit.pretrain import pretrain

        return pretrain(recipe, folder)
    return Run(recipe, folder).execute()


def _claim(folder: Path, recipe: PruneRecipe | PretrainRecipe) -> None:
    """Write the resolved recipe, or check that the directory's is the same."""
    path = folder / RECIPE
    if path.is_file():
        ours, theirs = recipe.model_dump(mode="json"), load_recipe(path).model_dump(mode="json")
        if difference := _difference(ours, theirs):
            raise RecipeError(
                f"{folder} holds the run of another recipe: {difference}; choose another --directory, or remove it"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty and holds no run; choose another --directory")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_recipe(recipe), encoding="utf-8")


def _difference(ours: Any, theirs: Any, key: str = "") -> str | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in [*ours, *(n for n in theirs if n not in ours)]:
            found = _difference(ours.get(name), theirs.get(name), f"{key}.{name}".lstrip("."))
            if found:
                return found
        return None
    return None if ours == theirs else f"{key} is {theirs!r} there and {ours!r} here"
