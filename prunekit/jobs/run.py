"""A run: the stages of a recipe in order, in one directory; a stage whose result exists is skipped.

A stage's result is written completely or not at all, and all random numbers depend on the recipe's seed. So a run that
was killed at any point can be resumed, and gives the result of an uninterrupted run (law 5).
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from prunekit.core.registry import denoiser_in
from prunekit.evaluation import comparison
from prunekit.evaluation.ceiling import fit, unfit, unfit_line
from prunekit.evaluation.comparison import Candidate
from prunekit.evaluation.routing import routing_lines, routing_report
from prunekit.evaluation.sheets import PictureRow, expert_note, picture_sheet
from prunekit.evaluation.table import (
    CEILING_COLUMNS,
    COLUMNS,
    EXPERT_COLUMNS,
    NAME,
    SEEN,
    SEEN_NOTE,
    Column,
    json_table,
    markdown_table,
    terminal_table,
    warning_lines,
)
from prunekit.evaluation.verdict import verdict
from prunekit.jobs.plan.amounts import CHOICE, ENCODING, GENERATION, REFIT, TUNING
from prunekit.jobs.recipe import (
    CompareRecipe,
    PretrainRecipe,
    PruneRecipe,
    RecipeError,
    dump_recipe,
    load_recipe,
    load_recorded,
    parse_recipe,
    precision_lines,
    precisions,
    resolve_recipe,
)
from prunekit.jobs.recovering import Recovering, Recovery
from prunekit.jobs.reporting import finish, prepare
from prunekit.jobs.stages import RunLog, Stages
from prunekit.jobs.timeline import MEASURING, TABLE, Timeline, timeline_of
from prunekit.measuring.latency_model import LatencyModel
from prunekit.methods.base import budget_cost
from prunekit.methods.latency_budget import predicted_and_measured
from prunekit.methods.result import PruneResult
from prunekit.report.source import Source
from prunekit.runtime.engines import LOCAL, EngineConfig, executor_of
from prunekit.runtime.executors import Call, Executor, OnePiece
from prunekit.runtime.files import clear_killed, read_json, write_json, write_text
from prunekit.runtime.processes import apart, current, is_companion, threads_of
from prunekit.runtime.progress import Log, watched
from prunekit.runtime.run_directory import LOCKS, LOG, METHODS, RECIPE, RESULT, RESULTS
from prunekit.runtime.screen import stdout_console
from prunekit.runtime.work import USERS, Piece, Sharing, occupied, refuse_foreign

R = TypeVar("R", bound=PruneRecipe | PretrainRecipe)
Stage = Literal["train", "draw", "measure"]  # stages whose pieces other nodes can do
SAMPLES, SEEN_SAMPLES = "samples", "samples-training"  # folders of pictures
LATENCY_COLUMNS = (
    NAME,
    Column("expert", "expert", ".0f"),
    Column("macs_ratio", "MACs", ".1f", "", "% of dense", 100),
    Column("predicted", "predicted time", ".1f", "", "% of dense", 100),
    Column("measured", "measured time", ".1f", "↓", "% of dense", 100),
    Column("error", "error of the prediction", "+.1f", "", "%", 100),
    Column("noise", "noise floor", ".1f", "", "%", 100),
)


class Run:
    """One recipe's directory, log and stages."""

    def __init__(self, recipe: PruneRecipe, directory: Path, log: Log):
        self.recipe, self.directory, self.log = recipe, directory, log
        self.before = _stamp(directory / RESULTS)
        self.timeline: Timeline | None = None  # only in the process that prints, and only for an unfinished run

    def execute(self, executor: Executor) -> Path:
        """Run every stage that is not done; print the table; return the directory."""
        self.log.say(f"{self.recipe.name}: {self.directory}")
        for line in precision_lines(self.recipe, current().device):
            self.log.say(line)
        if (count := current().count) > 1:
            self.log.say(f"{count} processes, {torch.get_num_threads()} thread(s) each")
        if current().is_main and not is_companion() and self.before is None:
            self.timeline = timeline_of(self.recipe, self.log.say, count)
        with watched(self.timeline.watch) if self.timeline else nullcontext():
            return self._make(executor)

    def _make(self, executor: Executor) -> Path:
        self.train(executor)
        with apart():  # from here on, processes share work through files alone, so that one may be lost
            self.draw(executor)
            self.measure(executor)
            if is_companion():
                return self.directory
            # Never done outside the lock, so a waiting process returns only after the tables and the report are written
            with threads_of(1):
                self.stages.share([Piece("table", lambda: False, self._compare_once)])
        return self.directory

    def _begin(self, part: str, name: str = "", index: int = 0) -> None:
        if self.timeline is not None:
            self.timeline.begin((part, name, index))

    @cached_property
    def stages(self) -> Stages:
        """The model and the data, loaded at the first use."""
        self._begin(ENCODING)
        stages = Stages(self.recipe, self.log, self.directory)
        stages.evaluator  # noqa: B018 - a missing evaluator is an error before any work
        return stages

    @cached_property
    def recovering(self) -> Recovering:
        """The models to train; at the first use, the methods choose their architectures."""
        recipe, stages, recoveries = self.recipe, self.stages, []
        for name in recipe.methods:
            folder = self.directory / METHODS / name
            if not (folder / RESULT).is_file():
                self._begin(CHOICE, name)
            result = stages.choose(recipe.method(name), folder)
            config, passes = recipe.fine_tuning(name), recipe.method(name).work(result.space).dense_passes
            recoveries.append(
                Recovery(
                    name,
                    result,
                    folder / "experts",
                    config,
                    recipe.seed,
                    closed_form=recipe.recover.closed_form,
                    fine_tunes=recipe.recover.fine_tune,
                    dense_passes=passes,
                )
            )

        def begins(name: str, index: int, trains: bool) -> None:
            self._begin(TUNING if trains else REFIT, name, index)

        return Recovering(stages, recoveries, begins)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The rows of the table; all models must exist."""
        return [self.stages.dense, *self.recovering.candidates()]

    def train(self, executor: Executor) -> None:
        """Recover the models of all methods; draw and measure rows while other processes train."""
        self.recovering.train(partial(self._draw_and_measure, self.stages), self._sharing(executor, "train"))

    def draw(self, executor: Executor) -> None:
        """Draw the pictures of all rows."""
        sharing, seen = self._sharing(executor, "draw"), self.stages.drawn_seen_prompts
        with executor.together():
            for candidate in self.candidates:
                self._begin(GENERATION, candidate.name)
                self.stages.draw(candidate, self.samples(candidate), sharing=sharing)
                if seen is not None:
                    folder = self.samples(candidate, SEEN_SAMPLES)
                    self.stages.draw(candidate, folder, prompts=seen, sharing=sharing)

    def measure(self, executor: Executor) -> None:
        """Measure the pictures of all rows."""
        self._begin(MEASURING)
        sharing = self._sharing(executor, "measure")
        sharing([self._measuring(candidate, self.stages) for candidate in self.candidates])

    def _sharing(self, executor: Executor, stage: Stage) -> Sharing:
        """Return the function that does a stage's pieces; another node does them by the same stage of its own `Run`."""
        arguments = {"recipe": self.recipe.model_dump(mode="json"), "directory": str(self.directory.absolute())}
        return partial(executor.map, locks=self.stages.locks, call=Call.of(work_on, **arguments, stage=stage))

    def _compare_once(self) -> None:
        """Write the tables, unless another process has written them since this one started."""
        if _stamp(self.directory / RESULTS) in (None, self.before):
            self._begin(TABLE)
            self.compare(self.candidates, self.stages)

    def _draw_and_measure(self, stages: Stages, candidate: Candidate) -> None:
        """Draw and measure a row's pictures unless they exist; after the dense row, record facts for the page."""
        stages.sample(candidate, self.samples(candidate))
        stages.sample_seen(candidate, self.samples(candidate, SEEN_SAMPLES))
        stages.share([self._measuring(candidate, stages)])
        if candidate is stages.dense:
            prepare(self.directory, stages)

    def _measuring(self, candidate: Candidate, stages: Stages) -> Piece:
        """Return the piece of work that measures a row's pictures."""

        def make() -> None:
            self.figures(candidate, stages.sample(candidate, self.samples(candidate))[0], stages)

        return Piece(f"figures-{candidate.name}", self._metrics(candidate).is_file, make)

    def _metrics(self, candidate: Candidate) -> Path:
        """Return the file of a row's figures."""
        return self.directory / "metrics" / f"{candidate.name}.json"

    def samples(self, candidate: Candidate, folder: str = SAMPLES) -> Path:
        """Return the folder of a row's pictures."""
        return self.directory / folder / candidate.name

    def compare(self, candidates: list[Candidate], stages: Stages) -> None:
        """Measure every row's pictures; write and print `results.json`, `table.md` and `comparison.png`."""
        rows, sheets, experts_of, routing, prompts = [], [], {}, {}, stages.prompts
        chosen = torch.arange(min(self.recipe.evaluation.num_pictures, prompts.num_names))
        for candidate in candidates:
            pictures, experts = stages.sample(candidate, self.samples(candidate))
            row = fit(self.figures(candidate, pictures, stages), unfit(stages.known))
            notes = [expert_note(int(experts[i]), candidate.macs[int(experts[i])]) for i in chosen]
            sheets.append(PictureRow(candidate.name, pictures[chosen], notes if candidate.router else None))
            row["seconds_per_image"] = self.timing(candidate, stages)
            rows.append(row)
            if candidate.router is not None:
                experts_of[candidate.name] = comparison.expert_rows(
                    candidate, experts, data=stages.data, prompts=prompts, dense=stages.dense
                )
                routing[candidate.name] = self.routing(candidate, stages)
        captions = [prompts.prompts[i] for i in chosen]
        title = f"{self.recipe.name}: same prompts and seeds"
        picture = picture_sheet(self.directory / "comparison.png", sheets, captions, title)
        evaluator = [{"name": name, **figures} for name, figures in stages.known.items()]
        left_out = [unfit_line(name, stages.known) for name in unfit(stages.known)]
        self.write(rows, experts_of, evaluator, self.latency(stages), routing, stages.environment, left_out)
        if sentence := verdict(rows, Source(self.directory).errors):
            self.log.say(sentence)
        self.log.say(f"table: {self.directory / 'table.md'}")
        self.log.say(f"picture: {picture}")
        commands = (
            f'next: prunekit generate {self.directory} --prompt "red apple"',
            f"  or: prunekit export {self.directory} OUT",
        )
        finish(self.directory, self.log.say, stages, commands)

    def figures(self, candidate: Candidate, pictures: Tensor, stages: Stages) -> dict[str, Any]:
        """Return a row's figures, measured once."""
        path = self._metrics(candidate)
        if not path.is_file():
            judged = stages.judge(pictures)
            seen = stages.sample_seen(candidate, self.samples(candidate, SEEN_SAMPLES))
            figures, errors = stages.measure(candidate, judged, seen)
            write_json(path.with_name(f"{candidate.name}.errors.json"), errors)
            write_json(path, figures)
        return read_json(path)

    def routing(self, candidate: Candidate, stages: Stages) -> dict[str, Any]:
        """Return the comparison of a mixture's router with its controls, measured once."""
        path = self.directory / "metrics" / f"{candidate.name}.routing.json"
        if not path.is_file():
            samples, reference = stages.agreement
            write_json(path, routing_report(candidate, stages.data, samples, reference, seed=self.recipe.seed))
        return read_json(path)

    def timing(self, candidate: Candidate, stages: Stages) -> float:
        """Return a row's seconds per image, measured once; in a file of its own, as it differs between equal runs."""
        path = self.directory / "metrics" / f"{candidate.name}.timing.json"
        if not path.is_file():
            seconds = comparison.seconds_per_image(candidate, stages.pipeline, stages.prompts, stages.sampling)
            write_json(path, {"seconds_per_image": seconds})
        return float(read_json(path)["seconds_per_image"])

    def latency(self, stages: Stages) -> list[dict]:
        """Return the predicted and the measured time of every architecture under a latency budget, measured once."""
        rows, settings = [], self.recipe.prune.latency
        for name in self.recipe.methods if settings is not None else ():
            path = self.directory / "metrics" / f"{name}.latency.json"
            if not path.is_file():
                model = denoiser_in(stages.pipeline)
                cost = budget_cost(stages.pipeline, self.recipe.method(name).config)
                chosen = PruneResult.load(self.directory / METHODS / name, model).architectures
                assert isinstance(cost, LatencyModel) and settings is not None
                write_json(path, predicted_and_measured(model, chosen, cost, settings))
            rows += [{"name": name, **row} for row in read_json(path)]
        return rows

    def warnings(self, name: str) -> list[str]:
        """Return the warnings about a method's choice."""
        return PruneResult.load(self.directory / METHODS / name).warnings()

    def write(
        self,
        rows: list[dict],
        experts: dict[str, list[dict]],
        ceiling: list[dict],
        latency: list[dict],
        routing: dict[str, dict],
        environment: dict[str, Any],
        left_out: list[str],
    ) -> None:
        """Write the tables as JSON and Markdown, and print them; left_out: lines that say why figures are missing."""
        results = {"recipe": self.recipe.name, "seed": self.recipe.seed, "precision": precisions(self.recipe)}
        results |= {"environment": environment, "table": json_table(rows)}
        has_seen = any(key.startswith(SEEN) for row in rows for key in row)
        results |= {"experts": {name: json_table(e, EXPERT_COLUMNS) for name, e in experts.items()}}
        results |= {"evaluator": json_table(ceiling, CEILING_COLUMNS)}
        results |= {"latency": json_table(latency, LATENCY_COLUMNS)} if latency else {}
        warnings = [f"{name}: {line}" for name in self.recipe.methods for line in self.warnings(name)] + left_out
        screen, parts = stdout_console(), [f"# {self.recipe.name}\n"]
        tables: list[tuple[str | None, list[dict], Sequence[Column]]] = [(None, rows, COLUMNS)]
        tables += [(f"Experts of {name}", members, EXPERT_COLUMNS) for name, members in experts.items()]
        tables += [("Latency as the budget", latency, LATENCY_COLUMNS)] if latency else []
        tables += [("What the evaluator says of known pictures", ceiling, CEILING_COLUMNS)]
        for title, content, columns in tables:
            parts += [f"## {title}\n"] if title else []
            parts += [markdown_table(content, columns)]
            parts += [] if title else [*([f"{SEEN_NOTE}\n"] if has_seen else []), *warning_lines(warnings)]
            screen.print(terminal_table(content, columns, title or self.recipe.name, screen.width))
        for name, report in routing.items():
            parts += routing_lines(name, report)
        results |= {"routing": routing} if routing else {}
        results["warnings"] = warnings
        write_text(self.directory / "table.md", "\n".join(parts))
        write_json(self.directory / RESULTS, results)


@lru_cache(maxsize=1)
def _opened(recipe: str, directory: str, log: Log) -> Run:
    """Return a run, and cache it so that its model and data stay in memory for the run's next piece."""
    content = parse_recipe(json.loads(recipe))
    assert isinstance(content, PruneRecipe), "it is a run's"
    return Run(content, Path(directory), log)


def work_on(executor: OnePiece, recipe: dict[str, Any], directory: str, stage: Stage) -> None:
    """Do one piece of a stage of a run, on a node of a cluster."""
    run = _opened(json.dumps(recipe), directory, executor.log)
    with apart():
        {"train": run.train, "draw": run.draw, "measure": run.measure}[stage](executor)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return (inode, size, modification time) of a file, which change when it is replaced; None if it is missing."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def start(recipe_path: str | Path, overrides: Iterable[str] = (), directory: str | Path | None = None) -> Path:
    """Run a recipe from its file, on its engine; return the run directory (`runs/NAME` by default).

    A run of the same recipe in the directory is resumed. Raises RecipeError for a run of another recipe.
    """
    recipe = load_recipe(recipe_path, overrides)
    if isinstance(recipe, CompareRecipe):
        raise RecipeError(f"{recipe_path} is a comparison; start it with: prunekit compare {recipe_path}")
    folder = Path(directory or Path("runs") / recipe.name)
    engine = LOCAL if isinstance(recipe, PretrainRecipe) else recipe.engine
    return _work_in(folder, lambda others: _claim(folder, recipe, others), engine)


def resume(directory: str | Path, engine: EngineConfig = LOCAL) -> Path:
    """Resume the run in `directory`, on an engine; return it. Raises RecipeError if there is none."""
    recipe = recorded(directory, engine)
    return _work_in(Path(directory), lambda others: recipe, engine)


def recorded(directory: str | Path, engine: EngineConfig = LOCAL) -> PruneRecipe | PretrainRecipe:
    """Return the recipe of the run in `directory`, set to an engine. Raises RecipeError if there is no run."""
    folder = Path(directory)
    if not (folder / RECIPE).is_file():
        raise RecipeError(f"{folder} is not a run directory: it has no {RECIPE}; start one with `prunekit run RECIPE`")
    recipe = load_recorded(folder / RECIPE)
    if isinstance(recipe, CompareRecipe):
        raise RecipeError(f"{folder} is a comparison; resume it with: prunekit compare {folder / RECIPE}")
    if isinstance(recipe, PruneRecipe):
        return recipe.model_copy(update={"engine": engine})
    if engine != LOCAL:
        raise RecipeError(f"{folder} is a pre-training, which has no engine: leave engine={engine.kind} out")
    return recipe


def _work_in(folder: Path, enter: Callable[[bool], PruneRecipe | PretrainRecipe], engine: EngineConfig) -> Path:
    """Run a recipe on an engine, as one of the directory's users; return the directory.

    enter: returns the recipe; its argument says whether other processes work in the directory.
    """
    with ExitStack() as stack:

        def first() -> PruneRecipe | PretrainRecipe:
            leave = partial(shutil.rmtree, folder / LOCKS, ignore_errors=True)
            return stack.enter_context(occupied(folder, enter, leave))

        recipe = current().first(first)
        if isinstance(recipe, PretrainRecipe):
            from prunekit.embedded.pretrain import pretrain

            return pretrain(recipe, folder)
        log = RunLog.of(recipe, folder)
        with executor_of(engine, log) as executor:
            return Run(recipe, folder, log).execute(executor)


def _claim(folder: Path, recipe: R, others: bool) -> R:
    """Write the resolved recipe, or check that it equals the directory's recipe; return it.

    A recipe in a directory without results is replaced, unless other processes work there (`others`). `auto` takes the
    value in the directory's recipe, or else its meaning on this machine.
    """
    path = folder / RECIPE
    left = [file.name for file in folder.iterdir() if file.name not in (RECIPE, LOG, USERS)] if folder.is_dir() else []
    if path.is_file() and (left or others):
        recorded = load_recorded(path)
        recipe = resolve_recipe(recipe, current().device, recorded)
        if difference := _difference(recipe.model_dump(mode="json"), recorded.model_dump(mode="json")):
            raise RecipeError(
                f"{folder} holds the run of another recipe: {difference}; give another name=… or --directory, "
                "or remove the directory"
            )
        return recipe
    if path.is_file():
        (folder / LOG).unlink(missing_ok=True)
        path.unlink()
    clear_killed(path)
    refuse_foreign(folder, False, "run", "--directory")
    recipe = resolve_recipe(recipe, current().device)
    write_text(path, dump_recipe(recipe))
    return recipe


def _difference(ours: Any, theirs: Any, key: str = "") -> str | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in [*ours, *(n for n in theirs if n not in ours)]:
            difference = _difference(ours.get(name), theirs.get(name), f"{key}.{name}".lstrip("."))
            if difference:
                return difference
        return None
    return None if ours == theirs else f"{key} is {theirs!r} there and {ours!r} here"
