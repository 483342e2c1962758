"""Files that a data set names: which may be read, and how large they may be."""

import stat
from pathlib import Path

from prunekit.data.bad_samples import DataError

MOST_BYTES = 256 * 2**20  # of one picture or caption: 8192 x 8192 pixels of 4 bytes that are not compressed


def file_size(path: Path) -> int:
    """Return the size in bytes of a file that holds a picture or a caption, without opening it.

    Raises DataError, "is missing (why)": for a path that is not a regular file, as a device or a pipe may have no end;
    for more than MOST_BYTES; for a name that no file can have.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"is missing ({error.strerror})") from error
    except ValueError as error:  # the name holds NUL, or what the file system's encoding does not have
        raise DataError(f"has a name that no file can have ({error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError("is no file")
    if found.st_size > MOST_BYTES:
        raise DataError(f"has {too_large(found.st_size)}")
    return found.st_size


def read_file(path: Path) -> bytes:
    """Read a file that holds a picture or a caption. Raises DataError, "PATH is missing (why)", as `file_size` does."""
    try:
        file_size(path)
        return path.read_bytes()
    except DataError as error:
        raise DataError(f"{path} {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error


def too_large(size: int) -> str:
    """Return the words of a message about a picture or caption that has more than MOST_BYTES."""
    return f"{size:,} bytes, more than {MOST_BYTES:,}"
