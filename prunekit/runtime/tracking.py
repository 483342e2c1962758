"""Trackers that receive the numbers of a run's log: TensorBoard, Weights & Biases and trackio, through accelerate."""

import hashlib
import importlib.util
import math
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from pydantic import BaseModel, ConfigDict, Field

from prunekit.runtime.errors import MissingPackageError, UserError
from prunekit.runtime.files import full_disk_named, no_room
from prunekit.runtime.processes import current

EXTRA = "tracking"
TENSORBOARD = "tensorboard"
NO_TERMS = ("stage", "step", "event")  # keys of a row that are not tracked


class TrackingConfig(BaseModel):
    """Trackers that get a run's figures; `log.jsonl` always has them."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="Trackers, beside log.jsonl; the extra `tracking` installs their packages."
    )
    project: str = Field("prunekit", description="Project name for the trackers.")


class Trackers:
    """The trackers of one run; trackers that are started again for the same directory continue the same run.

    TensorBoard's files are in `directory`/tensorboard. Only the main process of a launch tracks. In other processes, or
    if the config names no trackers, every call does nothing.
    """

    def __init__(
        self, config: TrackingConfig, run_name: str, directory: Path, settings: Mapping[str, Any] | None = None
    ):
        """Start the trackers.

        Args:
            config: names the trackers and their project.
            run_name: name of the run in the trackers.
            directory: the run's directory; Weights & Biases and trackio identify the run by its path.
            settings: the recipe as a nested mapping; stored as the run's settings, with dotted keys.

        Raises:
            MissingPackageError: a tracker's package is missing; the message names the extra that installs it.
            UserError: a tracker does not start, for example without an account.

        """
        require_installed(config)
        self._started: dict[str, GeneralTracker] = {}
        self._directory = directory
        self._end = weakref.finalize(self, _finish, self._started)  # at the latest when the process ends
        self._stages: set[str] = set()
        if not config.trackers or not current().is_main:
            return
        known = (directory / TENSORBOARD).is_dir()
        _quiet_threads()
        for name in config.trackers:
            tracker = _build(name, config.project, run_name, directory)
            _try(name, directory, tracker.start)
            self._started[name] = tracker
            if settings and not (name == TENSORBOARD and known):
                _try(name, directory, partial(tracker.store_init_configuration, _plain(settings)))

    def log(self, row: Mapping[str, Any]) -> None:
        """Track the numbers in a row of the run's log as "stage/term", at the row's step, or step 0 if it has none.

        Raises:
            OSError: the disk is full; the error names the tracker's folder.

        """
        stage = row.get("stage")
        if not self._started or stage is None:
            return
        values = {f"{stage}/{term}": value for term, value in row.items() if term not in NO_TERMS and _is_finite(value)}
        step = int(row.get("step", 0))
        for name, tracker in self._started.items():
            if name == "wandb":  # its step must not decrease, but each stage counts from the start: an axis per stage
                if stage not in self._stages:
                    tracker.tracker.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                values_of, step_of = {**values, f"{stage}/step": step}, {}
            else:
                values_of, step_of = values, {"step": step}
            with full_disk_named(self._directory / name):
                tracker.log(values_of, **step_of)
        self._stages.add(stage)

    def close(self) -> None:
        """Write the values that are not written yet, and end the trackers."""
        self._end()


def require_installed(config: TrackingConfig) -> None:
    """Raise ImportError for a tracker whose package is missing; the message names the extra that has it."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(
                f"tracking.trackers has {name}, which is not installed: pip install 'prunekit[{EXTRA}]', or remove it"
            )


def run_id(directory: Path) -> str:
    """Return the identifier of a run, 12 hexadecimal digits that depend only on the directory's absolute path."""
    return hashlib.blake2b(str(directory.resolve()).encode(), digest_size=6).hexdigest()


def _build(name: str, project: str, run_name: str, directory: Path) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == TENSORBOARD:
        return kind(TENSORBOARD, directory)
    if name == "wandb":
        return kind(project, name=run_name, id=run_id(directory), resume="allow", dir=str(directory))
    return kind(project, name=f"{run_name}-{run_id(directory)}", resume="allow")  # trackio identifies a run by its name


def _finish(started: dict[str, GeneralTracker]) -> None:
    for tracker in started.values():
        try:
            tracker.finish()
        except OSError as error:
            if no_room(error) is None:  # `log` has already raised it, since it writes each row at once
                raise
    started.clear()


def _quiet_threads() -> None:
    """Suppress the traceback when a tracker's thread finds the disk full; the tracker's next call raises the error."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is None or no_room(failure.exc_value) is None:
            before(failure)

    threading.excepthook = hook


def _try(name: str, directory: Path, do: Callable[[], Any]) -> None:
    try:
        with full_disk_named(directory / name):
            do()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name} does not start: {lines[0]}; repair it, or remove it from tracking.trackers") from error


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level with dotted keys."""
    rows: dict[str, Any] = {}
    for key, value in settings.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return rows


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as trackers accept them: flat, numbers and texts unchanged, other values as text."""
    scalar = bool | int | float | str
    return {key: value if isinstance(value, scalar) else str(value) for key, value in flat(settings).items()}
