"""The connection of a command to a Ray cluster."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from prunekit.runtime.errors import MissingPackageError, UserError, first_line

EXTRA = "ray"


@contextmanager
def connected(address: str, what: str, setting: str) -> Iterator[None]:
    """Connect this process to a Ray cluster until the context ends.

    Args:
        address: address of the cluster; "auto": this machine's cluster; "local": start a cluster here.
        what: name of the feature that needs Ray, for the error.
        setting: prefix with which the user gives the address, such as "--ray-address ", for the error.

    Raises:
        UserError: Ray is not installed, or no cluster is at the address.

    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(f"{what} needs Ray: pip install 'prunekit[{EXTRA}]'") from error
    before = signal.getsignal(signal.SIGTERM)
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address == "local" else None,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster at {setting}{address} ({first_line(error)}); start one with `ray start --head`, or set "
            f"{setting}local"
        ) from error
    signal.signal(signal.SIGTERM, before)  # Ray's own handler ends the process at once
    try:
        yield
    finally:
        ray.shutdown()
