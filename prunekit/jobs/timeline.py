"""The stages of a run on a clock: which one runs, and about how long it and the rest of the run will take.

Before a stage has begun, its time is the plan's: its multiply-adds at the speed that this device reaches in a short
measurement. What the run itself measures replaces that: the pace of the stage that runs, and for later stages of the
same kind the ratio between the measured and the planned time.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from prunekit.jobs.plan.amounts import CHOICE, ENCODING, GENERATION, REFIT, TUNING, pruning_work
from prunekit.jobs.plan.data_size import size_of
from prunekit.jobs.plan.planned_models import Models
from prunekit.jobs.plan.planned_rows import rows_of
from prunekit.jobs.plan.speed import measure_speed
from prunekit.jobs.recipe import PruneRecipe
from prunekit.runtime.run_directory import DENSE

MEASURING, TABLE = "measuring", "table"  # parts of a run that a plan leaves out, because they are short
PACED = (CHOICE, REFIT, TUNING)  # parts whose one progress is that of the whole item
SPEED_SECONDS = 0.3  # of the measurement
PLAIN_SECONDS = 60.0  # between lines of one stage, at least
MOST_LINES = 20  # of one run, beside those at the beginning of a stage
TIMED_PICTURES = 10  # of each model, with the warm-up, for the seconds per image
MOVED = 0.1  # share of its planned time below which an item was there already, so that its time says nothing
Key = tuple[str, str, int]  # part of a run's work, the row that it serves, the number of the model


@dataclass
class Item:
    """A part of a stage, and the seconds that the plan gives it; None: not known."""

    key: Key
    stage: str
    planned: float | None = None


class Timeline:
    """Told what begins and how far it is; says a line when a stage begins, and from time to time after that."""

    def __init__(
        self, items: Sequence[Item], say: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ):
        """Take the items in the order in which they run.

        say: shows a line. clock: seconds.
        """
        self.items, self.say, self.clock = list(items), say, clock
        self.stages = list(dict.fromkeys(item.stage for item in items))
        self.index = -1  # of the item that runs
        self.ratios: dict[str, float] = {}  # measured over planned time, by part
        self.began = self.said = clock()
        self.between = PLAIN_SECONDS
        self.seconds = self.first = self.share = 0.0  # of the progress that was seen last in the item

    def begin(self, key: Key) -> None:
        """Begin an item; the items before it are done, or were there already."""
        index = next((i for i, item in enumerate(self.items) if item.key == key), self.index)
        if index == self.index:
            return
        changes = self.index < 0 or self.items[self.index].stage != self.items[index].stage
        self._measure(ended=True)
        self.index, self.began = index, self.clock()
        self.seconds = self.first = self.share = 0.0
        if changes:
            self._say(begins=True)

    def watch(self, seconds: float, first: float, share: float) -> None:
        """Take how far the item that runs is: after `seconds` a share of it in [0, 1] is done.

        first: the share that an earlier start had done.
        """
        self.seconds, self.first, self.share = seconds, first, share
        if self.index >= 0 and self.clock() - self.said >= self.between:
            self._say(begins=False)

    def seconds_left(self) -> tuple[float | None, float | None]:
        """Return the seconds that are left of the stage and of the run; None where they are not known."""
        self._measure(ended=False)
        running, *later = self.items[self.index :]
        left = [self._left(), *map(self._expected, later)]
        of_stage = [value for item, value in zip([running, *later], left, strict=True) if item.stage == running.stage]
        return _sum(of_stage), _sum(left)

    def _expected(self, item: Item) -> float | None:
        """Return the seconds of a whole item, by the pace of its part, else by that of the part measured last."""
        if item.planned is None:
            return None
        usual = [ratio for part, ratio in self.ratios.items() if part not in (ENCODING, MEASURING)]
        return item.planned * self.ratios.get(item.key[0], usual[-1] if usual else 1.0)

    def _left(self) -> float | None:
        """Return the seconds that are left of the item that runs."""
        item = self.items[self.index]
        expected = self._expected(item)
        rest = None if expected is None else max(0.0, expected - (self.clock() - self.began))
        if self.share <= self.first:
            return rest
        pace = self.seconds * (1 - self.share) / (self.share - self.first)
        return pace if item.key[0] in PACED else max(pace, rest or 0.0)

    def _measure(self, ended: bool) -> None:
        """Hold the time of the item that runs against its plan."""
        item = self.items[self.index] if self.index >= 0 else None
        if item is None or not item.planned:
            return
        part, passed = item.key[0], self.clock() - self.began
        if ended and passed >= MOVED * item.planned * (1 - self.first):
            measured = passed / (item.planned * (1 - self.first)) if self.first < 1 else 0.0
        elif not ended and part in PACED and self.share > self.first:
            measured = self.seconds / (item.planned * (self.share - self.first))
        else:
            return
        self.ratios.pop(part, None)  # so that the one measured last stands last
        self.ratios[part] = measured

    def _say(self, begins: bool) -> None:
        stage = self.items[self.index].stage
        of_stage, of_run = self.seconds_left()
        line = f"stage {self.stages.index(stage) + 1} of {len(self.stages)}: {stage}"
        if begins and of_stage is not None and stage != self.stages[-1]:
            line += f" (about {rounded(of_stage)})"
        if of_run is not None:
            line += f", about {rounded(of_run)} left"
            self.between = max(PLAIN_SECONDS, of_run / MOST_LINES)
        self.said = self.clock()
        self.say(line)


def timeline_of(recipe: PruneRecipe, say: Callable[[str], object], processes: int) -> Timeline:
    """Return the timeline of a resolved recipe's run on some processes.

    Without times where no plan can be made, as for a model that is not found: the run itself says what is wrong.
    """
    items = items_of(recipe)
    with suppress(Exception):
        planned = planned_seconds(recipe)
        for item in items:
            item.planned = planned[item.key] / processes
    return Timeline(items, say)


def items_of(recipe: PruneRecipe) -> list[Item]:
    """Return the items of a run in order, without times."""
    items = [Item((ENCODING, "", 0), "load the model, encode the data")]
    items += [Item((CHOICE, name, 0), f"choose what {name} removes") for name in recipe.methods]
    refits, tunes = recipe.recover.closed_form is not None, recipe.recover.fine_tune
    does = " and ".join(["refit"] * refits + ["fine-tune"] * tunes) or "cut"
    for name in recipe.methods:
        models = _models(recipe, name)
        stage = f"{does} {name}" if models == 1 else f"{does} {models} models of {name}"
        for index in range(models):
            items += [Item((REFIT, name, index), stage)] if refits else []
            items += [Item((TUNING, name, index), stage)]
    items += [Item((GENERATION, name, 0), "draw the pictures") for name in (DENSE, *recipe.methods)]
    items += [Item((MEASURING, "", 0), "measure the pictures")]
    return [*items, Item((TABLE, "", 0), "time the models, write the table and the report")]


def _models(recipe: PruneRecipe, name: str) -> int:
    return 1 if recipe.fine_tuning(name).shared_backbone else recipe.method(name).num_models


def planned_seconds(recipe: PruneRecipe) -> dict[Key, float]:
    """Return the seconds of each item on one process: multiply-adds as planned, at the speed measured here.

    A plan leaves the measuring of pictures and of times out. Their denoiser calls are counted here, by the recipe's
    numbers; the evaluator's are not.
    """
    model = Models().get(recipe.model, recipe.single_file_config)
    macs: dict[Key, float] = {item.key: 0.0 for item in items_of(recipe)}
    for work in pruning_work(recipe, rows_of(recipe, model), model, size_of(recipe.data)):
        part, name = work.part or CHOICE, work.label or ""
        keys = [key for key in macs if key[:2] == (part, name)]
        for key in keys:
            macs[key] += (work.macs or 0.0) / len(keys)
    evaluation, dense = recipe.evaluation, model.dense_macs()
    for name in (DENSE, *recipe.methods):
        macs[MEASURING, "", 0] += evaluation.num_predictions * (2 if recipe.data.holds_pictures else 1) * dense
        models = 1 if name == DENSE else recipe.method(name).num_models
        share = TIMED_PICTURES / (recipe.drawn_images * (1 if name == DENSE else 1 + len(evaluation.at_steps)))
        macs[TABLE, "", 0] += models * share * macs[GENERATION, name, 0]
    latent, precision = model.latent(recipe.resolution), recipe.fine_tune.precision
    speed = measure_speed(
        model.shape.denoiser, model.dense_macs(latent), latent, model.tokens, precision, seconds=SPEED_SECONDS
    )
    return {key: value / speed.macs_per_second for key, value in macs.items()}


def rounded(seconds: float) -> str:
    """Return an estimated time as people say it: "40 s", "3 min", "15 h", "2 days"."""
    for factor, unit, most in ((1, "s", 90), (60, "min", 120), (3600, "h", 48)):
        if seconds < factor * most:
            return f"{max(1, round(seconds / factor))} {unit}"
    return f"{round(seconds / 86400)} days"


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
