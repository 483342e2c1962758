"""The processes of a launch: how many there are, which one this is, and what they do together, through accelerate.

`accelerate launch` and `torchrun` start them, on one machine or many. A launch that would not become what it was asked
to be is refused: accelerate starts one process where `--cpu --num_processes 2` asks for two, and several processes
that each think themselves alone would all write the same run.
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

BUCKET = 2**24  # numbers that are summed over the processes at once
START = "torchrun --nproc-per-node N -m prunekit run RECIPE"
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun: how often it has started the launch again
COMPANION = "PRUNEKIT_COMPANION"  # set in the processes that a command starts beside its own
_apart: ContextVar[bool] = ContextVar("apart", default=False)


class LaunchError(RuntimeError):
    """Processes that were started so that they would not work together; the message says how to start them."""


class Processes:
    """What a process knows of the launch; where it works apart, it is alone, but on its own device."""

    def __init__(self, accelerator: Accelerator, apart: bool):
        self._accelerator = accelerator
        self.index = 0 if apart else accelerator.process_index
        self.count = 1 if apart else accelerator.num_processes
        self.device: torch.device = accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype, the same shapes in every process, by their sums over the processes."""
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
        """Let the main process do something while the others wait; its result, or its error, is everyone's."""
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
        """Return when every process has come here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()


def current() -> Processes:
    """Return the processes that this one works with. Raises LaunchError for a launch that is not what it seems."""
    accelerator = _accelerator()
    return Processes(accelerator, _apart.get())


def is_companion() -> bool:
    """Whether another process of the same command shows what this one makes."""
    return bool(os.environ.get(COMPANION))


@contextmanager
def apart() -> Iterator[None]:
    """A context in which this process works alone: what is trained or measured in it is not shared with the others."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


@contextmanager
def threads_of(busy: int) -> Iterator[None]:
    """A context in which `busy` of this machine's processes compute on its CPU, and share the threads of all."""
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
    """Join the processes of a launch that torchrun has started again, after one of them was lost.

    They meet through the store of the first attempt, where each would find the addresses of those that are gone.
    """
    store, rank, count = next(rendezvous("env://"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    init_process_group(backend, store=PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=count)


def check_launch(environment: Mapping[str, str], count: int) -> None:
    """Raise LaunchError where the environment of a launch asks for another number of processes than there are."""
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
