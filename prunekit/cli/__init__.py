"""The commands: parse, call, print."""

from prunekit.cli import jobs, models, results  # noqa: F401 (they register the commands, in this order)
from prunekit.cli.common import app
from prunekit.cli.errors import Commands, is_users

__all__ = ["Commands", "app", "is_users", "main"]


def main() -> None:
    """Run the command line."""
    app()
