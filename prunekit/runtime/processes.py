"""The processes of a launch: their number, the index of this process, and collective operations, through accelerate.

`accelerate launch` and `torchrun` start the processes, on one machine or several. A launch is refused if the number of
processes that work together differs from the number requested: accelerate starts one process for `--cpu
--num_processes 2`, and several processes that do not know of each other would all write the same run.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed import PrefixStore, init_process_group, rendezvous

T = TypeVar("T")

BUCKET = 2**24  # values that one collective call sums over the processes
START = "torchrun --nproc-per-node N -m prunekit run RECIPE"
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun: how many times it has restarted the launch
COMPANION = "PRUNEKIT_COMPANION"  # set in the processes that a command starts to help its own process
_apart: ContextVar[bool] = ContextVar("apart", default=False)


class LaunchError(RuntimeError):
    """Processes were started in a way in which they cannot work together; the message says how to start them."""


class Processes:
    """A process's view of its launch: its index, the number of processes, its device, and collective operations.

    Within `apart`, the process has index 0 and count 1, and keeps its device.
    """

    def __init__(self, accelerator: Accelerator, apart: bool):
        self._accelerator = accelerator
        self.index = 0 if apart else accelerator.process_index
        self.count = 1 if apart else accelerator.num_processes
        self.device: torch.device = accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes files."""
        return self.index == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors in place by their sums over the processes.

        All tensors have one dtype, and the same shapes in every process.
        """
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket]).to(self.device)
            parts = self._accelerator.reduce(flat, "sum").split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def agree(self, value: T) -> T:
        """Return the main process's value in every process."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def first(self, do: Callable[[], T]) -> T:
        """Call `do` in the main process while the others wait; return its result or raise its error in all of them."""
        if self.count == 1:
            return do()
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = (do(), None)
            except Exception as raised:
                outcome = (None, raised)
        result, error = self.agree(outcome)
        if error is not None:
            raise error
        return cast("T", result)

    def wait(self) -> None:
        """Wait until every process has called this method."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()


def current() -> Processes:
    """Return the launch that this process belongs to; LaunchError if its processes cannot work together."""
    accelerator = _accelerator()
    return Processes(accelerator, _apart.get())


def is_companion() -> bool:
    """Return whether another process of the same command started this one and shows its output."""
    return bool(os.environ.get(COMPANION))


@contextmanager
def apart() -> Iterator[None]:
    """Let this process work alone within the context: it does not share training or measurements with the others."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


@contextmanager
def threads_of(busy: int) -> Iterator[None]:
    """Divide the CPU threads of all the launch's processes on this machine among the `busy` ones within the context.

    busy: number of these processes that compute. Nothing changes if all of them compute, or on a GPU.
    """
    count, before = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.get_num_threads()
    if busy >= count or current().device.type != "cpu":
        yield
        return
    torch.set_num_threads(before * count // busy)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _accelerator() -> Accelerator:
    if (attempt := os.environ.get(ATTEMPT, "0")) != "0":
        _meet_again(attempt)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    check_launch(os.environ, accelerator.num_processes)
    return accelerator


def _meet_again(attempt: str) -> None:
    """Initialize the process group of a launch that torchrun has restarted after it lost a process.

    All attempts use one store, which still holds the addresses of the first attempt's processes. A prefix for each
    attempt keeps the new addresses apart from them.
    """
    store, rank, count = next(rendezvous("env://"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    init_process_group(backend, store=PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=count)


def check_launch(environment: Mapping[str, str], count: int) -> None:
    """Raise LaunchError if the environment of a launch requests another number of processes than `count`."""
    asked = environment.get("WORLD_SIZE")
    if asked is not None:
        if int(asked) != count:
            raise LaunchError(
                f"{asked} processes were started, but each process would run alone, as one of {count}; start "
                f"them with: {START}"
            )
        return
    if "MASTER_PORT" in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        raise LaunchError(
            f"`accelerate launch` started one process instead of several (because of --cpu); use: {START}"
        )
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(environment.get(name, 1)) > max(1, count):
            raise LaunchError(
                f"{environment[name]} processes were started ({name}), and none of them knows of the others; "
                f"start one per node, and in it: {START}"
            )


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
