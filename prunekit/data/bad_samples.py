"""Bad samples: the reason for each, the share of captions that they may cost, and the report that lists them."""

import json
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from prunekit.runtime.errors import UserError
from prunekit.runtime.files import write_text
from prunekit.runtime.progress import console

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MOST_BYTES = 256 * 2**20  # per picture or caption: 8192 x 8192 uncompressed pixels of 4 bytes


class DataError(UserError):
    """Bad input data; the message is one line that names the file or sample and its fault."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return a text with its control characters, line ends and lone surrogates escaped, so that it is one line."""
    return UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


@dataclass(frozen=True)
class BadSample:
    """One sample that is left out with its captions, or a shard that is missing or damaged."""

    sample: str  # its key, row or name
    file: str  # the file that holds the sample, or should hold it
    reason: str  # follows the sample's name in a sentence: "has an empty caption"
    captions: int = 1  # number of captions lost with the sample; an estimate if a whole shard is lost


@dataclass(frozen=True)
class Tolerance:
    """How many bad samples a data set may have, and where they are listed."""

    max_bad_share: float = 0.0  # largest fraction of all captions that may be lost
    report: Path | None = None  # JSON Lines: sample, file, reason, captions

    def check(self, skipped: list[BadSample], used: int) -> None:
        """Write the report and print how many captions are lost; raise DataError if none is left or too many are lost.

        used: number of captions that are left.
        """
        if self.report is not None:
            write_report(skipped, self.report)
        lost = sum(bad.captions for bad in skipped)
        if not skipped:
            return
        listed = f"listed in {self.report}" if self.report else "set data.report to a file to list them"
        counts = f"{lost:,} of {lost + used:,} captions cannot be used ({listed})"
        if not used or lost > self.max_bad_share * (lost + used):
            first = skipped[0]
            where = "" if Path(first.file).name in first.sample else f" ({first.file})"
            raise DataError(
                f"{first.sample}{where} {first.reason}; {counts}; data.max_bad_share allows {self.max_bad_share:g}"
            )
        console.print(f"data: {counts}", highlight=False, markup=False, soft_wrap=True)


def write_report(skipped: list[BadSample], path: Path) -> None:
    """Write one JSON object per bad sample to a JSON Lines file, atomically; an empty file if there are none."""
    rows = [json.dumps(asdict(bad), ensure_ascii=False) + "\n" for bad in skipped]
    write_text(path, "".join(rows), errors="backslashreplace")  # a lone surrogate becomes its JSON escape


def file_size(path: Path) -> int:
    """Return the size in bytes of a file that holds a picture or a caption, without opening it.

    Raises DataError if the file is missing, larger than MOST_BYTES or not a regular file (a device or a pipe may have
    no end), or if no file can have its name. The message has no path, for example "is missing (why)".
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"is missing ({error.strerror})") from error
    except ValueError as error:  # the name holds NUL, or a character that the file system's encoding lacks
        raise DataError(f"has a name that no file can have ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError("is not a file")
    if status.st_size > MOST_BYTES:
        raise DataError(f"has {too_large(status.st_size)}")
    return status.st_size


def read_file(path: Path) -> bytes:
    """Read a file that holds a picture or a caption; raise DataError with the path if `file_size` or reading fails."""
    try:
        file_size(path)
        return path.read_bytes()
    except DataError as error:
        raise DataError(f"{path} {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error


def too_large(size: int) -> str:
    """Return the part of an error message that says that `size` is more than MOST_BYTES."""
    return f"{size:,} bytes, more than {MOST_BYTES:,}"
