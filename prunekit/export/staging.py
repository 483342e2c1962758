"""A directory that appears whole, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunekit.errors import UserError
from prunekit.training.checkpoint import full_disk_named, share_with_others, temporary_for


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `directory` at the end; an error or an interrupt removes it.

    Its files get the rights of any new file. Raises ValueError, one line, for a directory that holds something already,
    and OSError, which names it, where the disk is full.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} holds something already; give a directory that is new or empty")
    temporary = temporary_for(directory.absolute())
    try:
        with full_disk_named(directory):
            temporary.mkdir(parents=True)
            yield temporary
            share_with_others(temporary)
            if directory.exists():
                directory.rmdir()
            temporary.replace(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
