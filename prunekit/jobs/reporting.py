"""`prunekit report`, and the last step of a run or comparison: record facts for the page, and write the page."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from prunekit.jobs import recording
from prunekit.jobs.recipe import PretrainRecipe, load_recorded
from prunekit.jobs.recording import record
from prunekit.jobs.stages import Stages
from prunekit.report import sensitivity
from prunekit.report.page import write_report
from prunekit.report.source import Source
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import no_room
from prunekit.runtime.progress import Saying
from prunekit.runtime.run_directory import RECIPE


def report(directories: Iterable[str | Path], with_sensitivity: bool, say: Callable[[str], None]) -> list[Path]:
    """Write the page of each run or comparison into its directory; return their paths.

    with_sensitivity: first measure the sensitivity to each layer, and record facts that an older run did not; this
        loads the model and the data. Raises a one-line ValueError for a directory that is not a run, before any page is
        written.
    """
    sources = [Source(Path(directory)) for directory in directories]
    if with_sensitivity:
        for source in sources:
            _measure(source, say)
    return [write_report(source.directory) for source in sources]


def prepare(directory: Path, stages: Stages) -> None:
    """Record facts for a run's page while other processes train; errors are ignored, and `finish` tries again."""
    with suppress(Exception):
        record(directory, stages)


def finish(
    directory: Path, say: Callable[[str], None], stages: Stages | None = None, last_lines: Iterable[str] = ()
) -> None:
    """Write the page at the end of a run or comparison; report an error of the page in one line and continue.

    say: shows a line, then writes it to the run's log, which may fail on a full disk.
    stages: stages of a run, to record facts for the page. last_lines: lines to show after the page's path.
    """
    try:
        if stages is not None:
            record(directory, stages)
        line = f"report: {write_report(directory)}"
    except Exception as error:  # the results are written already: an error of the page must not end the run
        kind = "" if isinstance(error, UserError) or no_room(error) else f"{type(error).__name__}: "
        text = " ".join(str(error).split())
        line = f"no report ({kind}{text}); `prunekit report {directory}` tries again"
    for text in (line, *last_lines):
        try:
            say(text)
        except OSError as error:
            if not no_room(error):
                raise


def _measure(source: Source, say: Callable[[str], None]) -> None:
    path = source.directory / RECIPE
    if not path.is_file():
        raise UserError(
            f"{source.directory} holds no {RECIPE}: its model and data are unknown, so nothing can be measured"
        )
    recipe = load_recorded(path)
    if isinstance(recipe, PretrainRecipe):
        raise UserError(f"{source.directory} is a pretraining: it has no pruned model to measure")
    stages = Stages(recipe, Saying(say), source.directory)
    if not source.is_comparison:
        record(source.directory, stages)
    if not (source.directory / sensitivity.FILE).is_file():
        recording.measure_sensitivity(stages, source.directory / sensitivity.FILE)
        say(f"sensitivity: {source.directory / sensitivity.FILE}")
