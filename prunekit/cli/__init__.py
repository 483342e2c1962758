"""The commands: parse, call, print."""

import gc

from prunekit.cli import job_commands, model_commands, result_commands  # noqa: F401 (in the order of the help)
from prunekit.cli.application import Commands, app, is_users

__all__ = ["Commands", "app", "is_users", "main"]


COLLECT_AFTER = 10_000  # new objects; Python's own 700 pass 1,166 times over the libraries while they are imported


def main() -> None:
    """Run the command line."""
    gc.set_threshold(COLLECT_AFTER)
    app()
