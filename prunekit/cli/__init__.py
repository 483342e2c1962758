"""The command line: each command parses its arguments, calls the library and prints the result."""

import gc

from prunekit.cli import job_commands, model_commands, result_commands  # noqa: F401 (in the order of the help)
from prunekit.cli.application import Commands, app, is_users

__all__ = ["Commands", "app", "is_users", "main"]


# New objects that start a garbage collection; at Python's default of 700, the imports cause 1,166 collections
COLLECT_AFTER = 10_000


def main() -> None:
    """Run the command line."""
    gc.set_threshold(COLLECT_AFTER)
    app()
