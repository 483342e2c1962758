"""Run one batch of every stage of a recipe in a temporary directory.

Batches, resolutions, precisions and models are those of the recipe, so the check shows whether they fit the device.
Only the numbers of steps and samples are reduced. The hours of the whole recipe are estimated from the measured times.
"""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from prunekit.data.encoded import encode
from prunekit.evaluation.comparison import Candidate
from prunekit.jobs.check.shrinking import first_images, short_refit, shrunk, write_shard
from prunekit.jobs.plan.amounts import CHOICE, ENCODING, GENERATION, REFIT, TUNING, Work, pruning_work, scheduled
from prunekit.jobs.plan.data_size import DataSize, size_of
from prunekit.jobs.plan.planned_models import Models, PlannedModel
from prunekit.jobs.plan.planned_rows import PlannedRow, rows_of, tuning_devices
from prunekit.jobs.recipe import AnyRecipe, CompareRecipe, PretrainRecipe, PruneRecipe, precision_lines, resolve_recipe
from prunekit.jobs.recovering import Recovery, recover
from prunekit.jobs.stages import RunLog, Stages
from prunekit.methods.result import PruneResult
from prunekit.runtime.errors import UserError
from prunekit.runtime.processes import current
from prunekit.runtime.tracking import require_installed
from prunekit.training.memory import STEPS

PAIRS = 64  # least number of pairs to read; a batch of pictures or the experts may need more
Kind = tuple[str | None, str | None]  # of work that is measured together: (label of the method, part of the work)
NO_MEMORY = ("not enough memory", "out of memory", "can't allocate memory")  # in error messages of torch


class CheckError(UserError):
    """A stage that failed; the message is one line that names the stage and the setting."""


@dataclass(frozen=True)
class Checked:
    """A finished stage of a check."""

    stage: str
    seconds: float
    peak_bytes: int  # of the device in this stage; on a CPU, of the process since its start


class CheckLog(RunLog):
    """A log that keeps the rows of the trainings and prints nothing."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.rows: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any]) -> None:
        """Keep a row of a training, whose seconds tell the pace of a step."""
        self.rows.append(row)

    def say(self, text: str) -> None:
        """Print nothing: the check reports whole stages."""

    def steps_seconds(self, since: int) -> float:
        """Return the seconds of all steps of the training logged after `since` rows, at the pace of its last step."""
        times = [row["seconds"] for row in self.rows[since:] if "step" in row]
        return STEPS * (times[-1] - times[-2]) if len(times) > 1 else sum(times)


def check(recipe: AnyRecipe, devices: int = 1, say: Callable[[Checked], Any] = lambda stage: None) -> dict[str, Any]:
    """Run one batch of every stage; return the stages, and the estimate of the whole recipe as in `scheduled`.

    devices: number of devices of the whole recipe; the check runs the share of one device.
    say: called with each finished stage.
    Raises CheckError at the first stage that fails, and ValueError for a recipe that cannot be checked.
    """
    if isinstance(recipe, PretrainRecipe):
        raise UserError(
            f"{recipe.name} has job=pretrain, and check is for prune and compare; use instead: prunekit run "
            "RECIPE scale=smoke"
        )
    if current().count > 1:
        raise UserError("check runs in one process: start it without a launcher, and give --devices N")
    with TemporaryDirectory(prefix="prunekit-check-") as directory:
        return _Check(recipe, devices, Path(directory), say).run()


class _Check:
    """A check in its directory."""

    def __init__(
        self, recipe: PruneRecipe | CompareRecipe, devices: int, directory: Path, say: Callable[[Checked], Any]
    ):
        self.recipe = resolve_recipe(recipe, current().device)
        self.devices, self.directory, self.say = devices, directory, say
        self.log = CheckLog(directory)
        self.done: list[Checked] = []
        self.spent: dict[Kind, float] = {}  # seconds

    def run(self) -> dict[str, Any]:
        """Run the stages in the order of a run; stop at the first stage that fails."""
        recipe = self.recipe
        with self._stage("recipe", "model, prune, methods, tracking"):
            require_installed(recipe.tracking)
            model: PlannedModel = Models().get(recipe.model, recipe.single_file_config)
            whole = rows_of(recipe, model)
            pairs = self._pairs(whole)
        with self._stage("data", "data"):
            images = first_images(recipe.data, recipe.seed, pairs)
            data = write_shard(images, pairs, self.directory / "data" / "0.tar")
            small = shrunk(recipe, data, self.devices, tuning_devices(whole, self.devices))
            rows = rows_of(small, model)
        with self._stage("model and encoding", "model, prompt_encoder, resolution"):
            stages = Stages(small, self.log, self.directory)
        images = stages.data.images
        with self._stage("encoding again", "resolution"):
            encode(stages.pipeline, images, stages.encoder, stages.resolution)
        self.spent[None, ENCODING] = self.done[-1].seconds
        results = {name: self._choose(name, row, model, stages) for name, row in rows.items()}
        with self._stage("prompts and evaluator", "evaluator"):
            stages.prompts  # noqa: B018
        for name, row in rows.items():
            self._recover(name, row, results[name], stages)
        tried = pruning_work(small, rows, model, DataSize(images.num_images, images.num_pairs, "tried"))
        return self._estimate(pruning_work(recipe, whole, model, size_of(recipe.data)), tried)

    def _pairs(self, rows: dict[str, PlannedRow]) -> int:
        evaluation = self.recipe.evaluation
        pictures = min(evaluation.batch_size, evaluation.num_images)
        refits = [short_refit(row.closed_form).samples for row in rows.values() if row.closed_form is not None]
        return max(PAIRS, pictures, *(2 * row.experts for row in rows.values()), *(2 * samples for samples in refits))

    @contextmanager
    def _stage(self, name: str, setting: str, batch: str = "") -> Iterator[None]:
        """Time a stage; turn an error in it into a CheckError.

        setting: settings that the error names. batch: setting that the stage's memory depends on.
        """
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            yield
            if cuda:
                torch.cuda.synchronize()
        except Exception as error:
            raise CheckError(explained(error, name, setting, batch)) from error
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.done.append(Checked(name, seconds, peak))
        self.say(self.done[-1])

    def _choose(self, name: str, row: PlannedRow, model: PlannedModel, stages: Stages) -> PruneResult:
        label, since = row.label, len(self.log.rows)
        setting = f"methods.{label}"
        work = row.method.work(model.costs(row.method.config)[0])
        searches = work.search is not None
        batch = f"{setting}.{work.memory_setting}" if work.memory_setting else ""
        with self._stage(f"{name}: {'search' if searches else 'choice'}", setting, batch):
            result = stages.choose(row.method, self.directory / "methods" / label, name)
        self.spent[label, CHOICE] = self.log.steps_seconds(since) if searches else self.done[-1].seconds
        return result

    def _recover(self, name: str, row: PlannedRow, result: PruneResult, stages: Stages) -> None:
        """Refit and fine-tune the first architecture, as the recipe says; draw with it, and measure."""
        label, since = row.label, len(self.log.rows)
        folder = self.directory / "methods" / label
        first = PruneResult([result.architectures[0]], info=result.info)
        cut = Recovery(label, first, folder / "cut", row.tuning, self.recipe.seed, fine_tunes=False)
        candidate: Candidate | None = None
        if row.closed_form is not None:
            of_all = row.closed_form == stages.recipe.recover.closed_form
            setting = "recover.closed_form" if of_all else f"methods.{label}.closed_form"
            with self._stage(f"{name}: {REFIT}", setting, f"{setting}.batch_size"):
                refitted = replace(cut, folder=folder / "refitted", closed_form=row.closed_form)
                candidate = recover(stages, refitted)
            self.spent[label, REFIT] = self.done[-1].seconds * row.models
        if row.tuning_steps:
            with self._stage(f"{name}: {TUNING}", "fine_tune", "fine_tune.micro_batch"):
                candidate = recover(stages, replace(cut, folder=folder / "experts", fine_tunes=True))
            self.spent[label, TUNING] = self.log.steps_seconds(since) * row.models
        if candidate is None:
            with self._stage(f"{name}: cut", "prune"):
                candidate = recover(stages, cut)
        with self._stage(f"{name}: generation", "evaluation", "evaluation.batch_size"):
            pictures, _ = stages.sample(candidate, folder / "samples")
            seen = stages.sample_seen(candidate, folder / "samples-training")
        self.spent[label, GENERATION] = self.done[-1].seconds
        with self._stage(f"{name}: evaluation", "evaluation, evaluator", "evaluation.batch_size"):
            stages.measure(candidate, stages.judge(pictures), seen)

    def _estimate(self, whole: list[Work], tried: list[Work]) -> dict[str, Any]:
        """Estimate the time of the whole recipe: scale the measured time of each kind of work by its MACs.

        Work that was not measured, such as drawing with the dense model, takes the slowest pace of drawing.
        """
        macs: dict[Kind, float] = {}
        for item in tried:
            macs[item.label, item.part] = macs.get((item.label, item.part), 0.0) + (item.macs or 0.0)
        pace = {kind: self.spent[kind] / macs[kind] for kind in self.spent if macs.get(kind)}
        usual = [pace[kind] for kind in pace if kind[1] == GENERATION]
        seconds = [(item.macs or 0.0) * pace.get((item.label, item.part), max(usual)) for item in whole]
        stages, used = list(self.done), precision_lines(self.recipe, current().device)
        return {"stages": stages, "precision": used, **scheduled(whole, seconds, self.devices)}


def explained(error: Exception, stage: str, setting: str, batch: str = "") -> str:
    """Return one line: what failed, why, and the setting to change."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(lines[0].split())
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        lower = f"lower {batch}" if batch else "use a larger device"
        lower += ", or set gradient_checkpointing=true as well" if batch.endswith("micro_batch") else ""
        return f"{stage} does not fit into memory: {lower} ({text})"
    explains = type(error).__module__.partition(".")[0] == "prunekit" or isinstance(error, ValueError | OSError)
    return f"{stage} failed: {text if explains else f'{type(error).__name__}: {text}'} (settings: {setting})"
