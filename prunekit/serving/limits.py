"""What one request may ask for, and the settings of the server; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec

from prunekit.runtime.errors import MissingPackageError, UserError

MOST_SEED = 2**63 - 1
LETTER_BYTES = 12  # of a letter in JSON at most: two escapes of six
API_KEY = "PRUNEKIT_API_KEY"  # a variable of the environment
OTHER_BYTES = 16_384  # of a request's body beside its prompts


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    letters: of a prompt, and of a negative prompt. images: of one prompt (`n`). guidance: the largest scale.
    pixels: of an image; None: those of the model's own size.
    """

    letters: int = 1000
    steps: int = 100
    images: int = 10
    guidance: float = 30.0
    pixels: int | None = None

    @property
    def body(self) -> int:
        """Bytes of a request's body: both prompts, every letter escaped, and the rest."""
        return OTHER_BYTES + 2 * LETTER_BYTES * self.letters


def check_whole(name: str, value: float | None, least: int, most: int) -> int:
    """Return a number that must be whole and within bounds, both included; UserError that names it otherwise."""
    if not isinstance(value, int | float) or value != int(value) or not least <= value <= most:
        raise UserError(f"{name}={value}: a whole number from {least} to {most}")
    return int(value)


@dataclass(frozen=True)
class ServerSettings:
    """How the server runs.

    Args:
        method: of a run: whose pruned model; None: the method that routes, else the first by name.
        host, port: where it listens; port 0: any free one.
        devices: where it draws, one copy of the model on each; empty: a GPU where there is one.
        name: of the model in the API; None: the directory's.
        max_batch: images of one call of the stock pipeline.
        max_resident: experts in a device's memory; None: all.
        max_queued: images that wait for a device; more are refused with status 503.
        deterministic: draw every image alone, so that its bytes depend on its request alone.
        request_seconds: after which a request is given up with status 504.
        api_key: that requests must carry; None: none is needed.
        limits: of one request.

    """

    method: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    devices: tuple[str, ...] = ()
    name: str | None = None
    max_batch: int = 8
    max_resident: int | None = None
    max_queued: int = 64
    deterministic: bool = False
    request_seconds: float = 300.0
    api_key: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self):
        if self.limits.images > self.max_queued:
            raise UserError(
                f"a request may ask for {self.limits.images} images, and only {self.max_queued} may wait: raise "
                "--max-queued, or lower --max-images"
            )
        if self.api_key is not None and not self.api_key.strip():
            raise UserError("the API key is empty: give one, or leave it out to ask for none")

    @property
    def batch(self) -> int:
        """Images of one call of the stock pipeline, as `deterministic` allows."""
        return 1 if self.deterministic else self.max_batch


@dataclass(frozen=True)
class PoolSettings:
    """Where the server draws on a Ray cluster.

    Args:
        replicas: the fewest and the most copies of the model; equal numbers: no autoscaling.
        cpus: CPUs of a replica, and the threads that it computes with.
        gpus: GPUs of a replica, or a share of one; None: 1 where the cluster has GPUs, else 0.
        address: of the cluster; "auto": of this machine; "local": one is started here.

    """

    replicas: tuple[int, int] = (1, 1)
    cpus: float = 1.0
    gpus: float | None = None
    address: str = "auto"

    @classmethod
    def of(cls, replicas: str, cpus: float, gpus: float | None, address: str) -> PoolSettings:
        """Return the settings; replicas: "2", or "1:4" for autoscaling. UserError for another text."""
        least, _, most = replicas.partition(":")
        if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
            raise UserError(f"--replicas {replicas}: give a number such as 2, or the fewest and the most as 1:4")
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise UserError(f"--gpus-per-replica {gpus:g}: give a whole number, or a share of one GPU such as 0.5")
        return cls((int(least), int(most or least)), cpus, gpus, address)


def check_packages(extra: str = "serve") -> None:
    """ImportError that names the extra, "serve" or "ray", where a package of it is missing."""
    for package in {"serve": ("fastapi", "uvicorn", "prometheus_client"), "ray": ("ray",)}[extra]:
        if find_spec(package) is None:
            raise MissingPackageError(f"the server needs {package}; pip install 'prunekit[{extra}]'")
