"""Progress of a run: which stage runs, and about how long the stage and the rest of the run will take.

Before a stage begins, its time is planned: its MACs at this device's speed in a short measurement. Measurements in the
run replace the plan: the pace of the running stage and, for later stages of the same kind, the ratio between the
measured and the planned time.
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
from prunekit.runtime.engines import LOCAL
from prunekit.runtime.run_directory import DENSE

MEASURING, TABLE = "measuring", "table"  # parts of a run that a plan leaves out, because they are short
PACED = (CHOICE, REFIT, TUNING)  # parts with a single progress bar, for the whole item
SPEED_SECONDS = 0.3  # duration of the speed measurement
PLAIN_SECONDS = 60.0  # least time between lines of one stage
MOST_LINES = 20  # largest number per run, without the lines at the beginning of a stage
TIMED_PICTURES = 10  # pictures per model that measure the seconds per image, with warm-up
MOVED = 0.1  # an item that takes less than this share of its planned time existed before; its time is ignored
Key = tuple[str, str, int]  # part of a run's work, name of its row, index of the model


@dataclass
class Item:
    """A part of a stage, and its planned seconds (None: not known)."""

    key: Key
    stage: str
    planned: float | None = None


class Timeline:
    """Tracks the items of a run; prints a line when a stage begins, and from time to time while it runs."""

    def __init__(
        self, items: Sequence[Item], say: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ):
        """Take the items in the order in which they run.

        say: shows a line. clock: returns the present time in seconds.
        """
        self.items, self.say, self.clock = list(items), say, clock
        self.stages = list(dict.fromkeys(item.stage for item in items))
        self.index = -1  # index of the running item; -1: none
        self.ratios: dict[str, float] = {}  # measured over planned time, by part
        self.began = self.said = clock()
        self.between = PLAIN_SECONDS
        self.seconds = self.first = self.share = 0.0  # latest progress of the item, as in `watch`

    def begin(self, key: Key) -> None:
        """Begin an item; the items before it are done, now or by an earlier start."""
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
        """Take the progress of the running item: after `seconds`, a share of it in [0, 1] is done.

        first: the share that an earlier start had done.
        """
        self.seconds, self.first, self.share = seconds, first, share
        if self.index >= 0 and self.clock() - self.said >= self.between:
            self._say(begins=False)

    def seconds_left(self) -> tuple[float | None, float | None]:
        """Return the seconds left of the stage and of the run; None: not known."""
        self._measure(ended=False)
        running, *later = self.items[self.index :]
        left = [self._left(), *map(self._expected, later)]
        of_stage = [value for item, value in zip([running, *later], left, strict=True) if item.stage == running.stage]
        return _sum(of_stage), _sum(left)

    def _expected(self, item: Item) -> float | None:
        """Return a whole item's seconds: as planned, times the ratio of its part or else of the part measured last."""
        if item.planned is None:
            return None
        usual = [ratio for part, ratio in self.ratios.items() if part not in (ENCODING, MEASURING)]
        return item.planned * self.ratios.get(item.key[0], usual[-1] if usual else 1.0)

    def _left(self) -> float | None:
        """Return the seconds left of the running item; None: not known."""
        item = self.items[self.index]
        expected = self._expected(item)
        rest = None if expected is None else max(0.0, expected - (self.clock() - self.began))
        if self.share <= self.first:
            return rest
        pace = self.seconds * (1 - self.share) / (self.share - self.first)
        return pace if item.key[0] in PACED else max(pace, rest or 0.0)

    def _measure(self, ended: bool) -> None:
        """Update the ratio of measured to planned time of the running item's part."""
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
        self.ratios.pop(part, None)  # so that the latest ratio is last
        self.ratios[part] = measured

    def _say(self, begins: bool) -> None:
        stage = self.items[self.index].stage
        of_stage, of_run = self.seconds_left()
        if of_run is None and not begins:
            return
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

    On a cluster, the items have no times, since this machine's speed says nothing about the nodes. If no plan can be
    made, such as for a missing model, they have none either; the run reports the error.
    """
    items = items_of(recipe)
    if recipe.engine != LOCAL:
        return Timeline(items, say)
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
    """Return the seconds of each item on one process: its planned MACs at the speed measured on this machine.

    A plan does not contain the measurement of pictures and times. Its denoiser calls are counted here from the recipe's
    numbers; the evaluator's work is not counted.
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
    """Return an estimated time in its most readable unit: "40 s", "3 min", "15 h", "2 days"."""
    for factor, unit, most in ((1, "s", 90), (60, "min", 120), (3600, "h", 48)):
        if seconds < factor * most:
            return f"{max(1, round(seconds / factor))} {unit}"
    return f"{round(seconds / 86400)} days"


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
