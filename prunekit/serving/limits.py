"""What one request may ask for, and the settings of the server; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec

from prunekit.runtime.errors import MissingPackageError, UserError

MOST_SEED = 2**63 - 1
LETTER_BYTES = 12  # most bytes of a character in JSON: two escapes of 6 bytes
API_KEY = "PRUNEKIT_API_KEY"  # name of an environment variable
OTHER_BYTES = 16_384  # most bytes of a request's body in addition to its prompts


@dataclass(frozen=True)
class Limits:
    """Upper limits of one request.

    letters: characters of a prompt, and of a negative prompt. steps: scheduler steps. images: images of the prompt
    (`n`). guidance: guidance scale. pixels: pixels of an image; None: as many as the model's default size has.
    """

    letters: int = 1000
    steps: int = 100
    images: int = 10
    guidance: float = 30.0
    pixels: int | None = None

    @property
    def body(self) -> int:
        """Most bytes of a request's body: both prompts with every character escaped, and the other fields."""
        return OTHER_BYTES + 2 * LETTER_BYTES * self.letters


def check_whole(name: str, value: float | None, least: int, most: int) -> int:
    """Return `value` as an int; UserError, which names it, unless it is a whole number from `least` to `most`."""
    is_wrong = not isinstance(value, int | float) or isinstance(value, bool)
    if value is None or is_wrong or not least <= value <= most or value != int(value):  # NaN is in no range
        raise UserError(f"{name}={value}: a whole number from {least} to {most}")
    return int(value)


@dataclass(frozen=True)
class ServerSettings:
    """How the server runs.

    Args:
        method: method of the run whose models draw; None: the method that routes, else the first by name.
        host, port: address to listen on; port 0: any free port.
        devices: devices that draw, each with its own copy of the model; empty: a GPU if there is one, else the CPU.
        name: name of the model in the API; None: the directory's name.
        max_batch: largest number of images per call of the stock pipeline.
        max_resident: largest number of experts in a device's memory; None: all.
        max_queued: largest number of waiting images; further images are refused with status 503.
        deterministic: whether every image is drawn alone, so that its bytes depend on its request alone.
        request_seconds: time limit of a request; a request that takes longer fails with status 504.
        api_key: key that requests must carry; None: no key is needed.
        limits: upper limits of one request.

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
        """Largest number of images per call of the stock pipeline: 1 if `deterministic`, else `max_batch`."""
        return 1 if self.deterministic else self.max_batch


@dataclass(frozen=True)
class PoolSettings:
    """The replicas that draw for the server on a Ray cluster.

    Args:
        replicas: smallest and largest number of replicas (copies of the model); equal numbers: no autoscaling.
        cpus: CPUs of a replica, and the threads that it computes with.
        gpus: GPUs of a replica, or a fraction of one GPU; None: 1 if the cluster has GPUs, else 0.
        address: address of the cluster; "auto": this machine's cluster; "local": start a cluster here.

    """

    replicas: tuple[int, int] = (1, 1)
    cpus: float = 1.0
    gpus: float | None = None
    address: str = "auto"

    @classmethod
    def of(cls, replicas: str, cpus: float, gpus: float | None, address: str) -> PoolSettings:
        """Return the settings from a command's options.

        replicas: "2", or "1:4" for autoscaling between 1 and 4 replicas.

        Raises:
            UserError: `replicas` has another form, or `gpus` is above 1 and not a whole number.

        """
        least, _, most = replicas.partition(":")
        if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
            raise UserError(f"--replicas {replicas}: give a number such as 2, or the fewest and the most as 1:4")
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise UserError(f"--gpus-per-replica {gpus:g}: give a whole number, or a share of one GPU such as 0.5")
        return cls((int(least), int(most or least)), cpus, gpus, address)


def check_packages(extra: str = "serve") -> None:
    """Raise MissingPackageError, which names the extra ("serve" or "ray"), if a package of the extra is missing."""
    for package in {"serve": ("fastapi", "uvicorn", "prometheus_client"), "ray": ("ray",)}[extra]:
        if find_spec(package) is None:
            raise MissingPackageError(f"the server needs {package}; pip install 'prunekit[{extra}]'")
