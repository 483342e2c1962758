"""Samples that cannot be used: what is wrong with them, how many may be, and the file that lists them."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from prunekit.errors import UserError
from prunekit.training.checkpoint import write_text
from prunekit.training.progress import console

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class DataError(UserError):
    """Bad input data: the message, one line, names the file or sample and what is wrong with it."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return a text with its control characters, line ends and lone surrogates escaped, so that it is one line."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


@dataclass(frozen=True)
class BadSample:
    """One sample that is left out with its captions, or a shard that is missing or damaged."""

    sample: str  # its key, row or name
    file: str  # the file that holds it, or should
    reason: str  # follows the sample's name in a sentence: "has an empty caption"
    captions: int = 1  # that are lost with it; an estimate where a whole shard is


@dataclass(frozen=True)
class Tolerance:
    """How many bad samples a data set may have, and where they are listed."""

    max_bad_share: float = 0.0  # of all captions
    report: Path | None = None  # JSON Lines: sample, file, reason, captions

    def check(self, skipped: list[BadSample], used: int) -> None:
        """Write the report, say what was skipped, and raise DataError where it is more than the share allows.

        used: how many captions are left.
        """
        if self.report is not None:
            write_report(skipped, self.report)
        lost = sum(bad.captions for bad in skipped)
        if not skipped:
            return
        listed = f"listed in {self.report}" if self.report else "set data.report to a file that shall list them"
        counts = f"{lost:,} of {lost + used:,} captions cannot be used ({listed})"
        if not used or lost > self.max_bad_share * (lost + used):
            first = skipped[0]
            where = "" if Path(first.file).name in first.sample else f" ({first.file})"
            raise DataError(
                f"{first.sample}{where} {first.reason}; {counts}; data.max_bad_share allows {self.max_bad_share:g}"
            )
        console.print(f"data: {counts}", highlight=False, markup=False, soft_wrap=True)


def write_report(skipped: list[BadSample], path: Path) -> None:
    """Write one JSON object a bad sample to a JSON Lines file, atomically; an empty file where all are good."""
    rows = [json.dumps(asdict(bad), ensure_ascii=False) + "\n" for bad in skipped]
    write_text(path, "".join(rows), errors="backslashreplace")  # a lone surrogate becomes JSON's escape of it
