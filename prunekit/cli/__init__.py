"""The commands: parse, call, print."""

import gc

from prunekit.cli import jobs, models, recipes, results  # noqa: F401 (they register the commands, in this order)
from prunekit.cli.common import app
from prunekit.cli.errors import Commands, is_users

__all__ = ["Commands", "app", "is_users", "main"]


COLLECT_AFTER = 10_000  # new objects; Python's own 700 pass 1,166 times over the libraries while they are imported


def main() -> None:
    """Run the command line."""
    gc.set_threshold(COLLECT_AFTER)
    app()
