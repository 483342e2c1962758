"""Work on files that all processes of a directory share, and that leaves no lock file behind."""

from collections.abc import Sequence
from pathlib import Path

from prunekit.training.claims import Piece, share
from prunekit.training.processes import threads_of


def share_and_tidy(pieces: Sequence[Piece], locks: Path) -> None:
    """Do the pieces as `share` does, wait until all are done, and remove their lock files.

    A process that still waits for one looks whether its piece is done before it does it, so none is made twice.
    """
    with threads_of(max(1, len(pieces))):  # not of those that are left, so that a resumed run computes the same
        share(pieces, locks)
    for piece in pieces:
        (locks / f"{piece.name}.lock").unlink(missing_ok=True)
