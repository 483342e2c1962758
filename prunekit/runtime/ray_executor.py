"""The executor that runs pieces of work as tasks of a Ray cluster; see `executors`.

A task builds the list of pieces again on its node, from a call with JSON arguments, and does one piece of the list
while it holds the piece's lock file. A node that is cut off but still runs keeps the lock, so no other task does its
piece. A node that dies loses the lock, and another task does its piece. The command that started the tasks shows and
logs their messages.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from prunekit.runtime.companions import END_SECONDS
from prunekit.runtime.errors import UserError, first_line
from prunekit.runtime.executors import SETTING, Call
from prunekit.runtime.processes import current
from prunekit.runtime.progress import Log, Progress, console
from prunekit.runtime.ray_connection import connected
from prunekit.runtime.ray_tasks import STOPPED, TAKEN, Mailbox, Place, perform
from prunekit.runtime.termination import deferred
from prunekit.runtime.work import POLL_SECONDS, Piece

ATTEMPTS = 5  # for a piece whose process or node is lost; after that, the cause is likely the piece, such as its memory
AHEAD = 2  # submitted tasks per task that the nodes can run at once
WAITING_SECONDS = 60.0  # between log lines that say that no node can take a task


@dataclass
class Task:
    """A piece of a list, with the call that builds the list on another node."""

    piece: Piece
    position: int  # in its list
    call: Call
    locks: Path
    wait: bool
    after: float = 0.0  # earliest time of its submission, on the monotonic clock

    @property
    def lock(self) -> Path:
        """The piece's lock file; tasks with the same one, such as cells that share a search, run one after another."""
        return self.locks / f"{self.piece.name}.lock"


class RayExecutor:
    """Executor on the nodes of a Ray cluster. `map` submits tasks as nodes have room, and submits lost tasks again."""

    def __init__(self, cpus: float, gpus: float | None, log: Log):
        """Prepare the tasks; see `cluster`."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._log, self._token = ray, log, uuid4().hex[:8]
        gpus = gpus if gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        self._needs, self._threads = {"CPU": cpus, "GPU": gpus}, max(1, int(cpus))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = ray.remote(num_cpus=0)(Mailbox)
        self._mailbox = mailbox.options(scheduling_strategy=here).remote()
        # `map` submits lost tasks again, so Ray does not; a process keeps its models loaded for many tasks
        self._perform = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=0, scheduling_strategy="SPREAD"
        )(perform)
        self._gathered: list[Task] | None = None
        self._said: set[str] = set()
        self._waited = 0.0  # when the log last said that no node can take a task, on the monotonic clock

    def map(self, pieces: Sequence[Piece], locks: Path, call: Call, wait: bool = True) -> None:
        """Do the pieces as `Executor.map` says."""
        tasks = [Task(piece, position, call, locks.absolute(), wait) for position, piece in enumerate(pieces)]
        if self._gathered is None:
            self._do(tasks)
        else:
            self._gathered += tasks

    @contextmanager
    def together(self) -> Iterator[None]:
        """Collect the lists that `map` receives within the context, and do all of them together when it ends."""
        gathered: list[Task] = []
        self._gathered = gathered
        try:
            yield
        finally:
            self._gathered = None
        self._do(gathered)

    def _do(self, tasks: list[Task]) -> None:
        """Submit tasks until none is left; an error or a signal also ends the running tasks."""
        left, running, losses = [task for task in tasks if not task.piece.done()], dict[Any, Task](), Counter[str]()
        if not left:
            return
        progress = Progress("pieces on Ray", len(tasks))
        with self._guarded({task.locks for task in left}), deferred() as termination, progress:
            try:
                while left or running:
                    left = self._submit(left, running)
                    left += self._finished(running, losses)
                    self._pass_on()
                    progress.update(len(tasks) - len(left) - len(running))
                    if termination.requested:
                        self._end(running)
                        termination.leave()
            except BaseException:
                self._end(running)
                raise

    def _submit(self, left: list[Task], running: dict[Any, Task]) -> list[Task]:
        """Submit tasks while nodes have room; return the tasks that are left."""
        rest, locked = list[Task](), {task.lock for task in running.values()}
        room = AHEAD * self._slots() - len(running)
        for task in left:
            if room < 1 or task.lock in locked or time.monotonic() < task.after:
                rest.append(task)
            elif task.piece.done():
                continue
            elif not task.piece.ready():
                rest.append(task)
            else:
                place = Place.here(self._guard(task.locks))
                what = (task.call, task.piece.name, task.position, place, self._threads, self._mailbox)
                running[self._perform.remote(*what)] = task
                locked.add(task.lock)
                room -= 1
        return rest

    def _finished(self, running: dict[Any, Task], losses: Counter[str]) -> Iterator[Task]:
        """Wait at most 0.5 s for a task to end; yield the tasks to submit again. Raises the error of a failed task."""
        if not running:
            time.sleep(POLL_SECONDS)
            return
        ended, _ = self._ray.wait(list(running), timeout=POLL_SECONDS)
        for reference in ended:
            task = running.pop(reference)
            try:
                end = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from error
            except self._ray.exceptions.RayError as error:
                end, name = STOPPED, task.piece.name
                losses[name] += 1
                if losses[name] == ATTEMPTS:
                    raise UserError(f"{name}: its process was lost {ATTEMPTS} times: {first_line(error)}") from error
                self._log.say(f"{name}: its process or node was lost, and another one takes it over")
            if end == STOPPED or (end == TAKEN and task.wait):
                task.after = time.monotonic() + POLL_SECONDS
                yield task

    def _slots(self) -> int:
        """Return how many tasks the nodes can run at once, at least 1; log a line if no node can run one."""
        slots = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                slots += int(min(has.get(name, 0) / need for name, need in self._needs.items() if need))
        if not slots and time.monotonic() - self._waited > WAITING_SECONDS:
            self._waited = time.monotonic()
            needs = " and ".join(f"{need:g} {name}" for name, need in self._needs.items() if need)
            self._log.say(f"waiting for a Ray node with {needs}, which {SETTING}.cpus and {SETTING}.gpus ask for")
        return max(1, slots)

    def _guard(self, locks: Path) -> Path:
        return locks / f"ray-{self._token}.guard"

    @contextmanager
    def _guarded(self, folders: set[Path]) -> Iterator[None]:
        """Hold a guard lock in each folder of locks; tasks check it to see whether locks hold between nodes."""
        guards = [FileLock(self._guard(folder)) for folder in folders]
        try:
            for guard in guards:
                Path(guard.lock_file).parent.mkdir(parents=True, exist_ok=True)
                guard.acquire()
            yield
        finally:
            for guard in guards:
                guard.release()
                Path(guard.lock_file).unlink(missing_ok=True)

    def _pass_on(self) -> None:
        """Show and log the messages that tasks have sent."""
        for kind, content in self._ray.get(self._mailbox.take.remote()):
            if kind == "row":
                self._log.log(content)
            elif kind == "say":
                if content not in self._said:  # every process says the same when it has loaded the data
                    self._said.add(content)
                    self._log.say(content)
            elif content is not None:
                console.print(content, highlight=False, markup=False)

    def _end(self, running: dict[Any, Task]) -> None:
        """Ask running tasks to save and end, and wait for them for at most 60 s."""
        if not running:
            return
        with suppress(self._ray.exceptions.RayError):  # raised if the cluster is lost
            for reference in running:
                self._ray.cancel(reference)
            self._ray.wait(list(running), num_returns=len(running), timeout=END_SECONDS)
            running.clear()
            self._pass_on()


@contextmanager
def cluster(address: str, cpus: float, gpus: float | None, log: Log) -> Iterator[RayExecutor]:
    """Connect to a Ray cluster until the context ends; yield the cluster's executor.

    Args:
        address: address of the cluster; "auto": this machine's cluster; "local": start a cluster here.
        cpus: CPUs of a task, and the threads that it computes with.
        gpus: GPUs of a task; None: 1 if the cluster has GPUs, else 0.
        log: receives the lines and rows of tasks.

    Raises:
        UserError: Ray is not installed, no cluster is at the address, or this process is one of several in a launch.

    """
    if current().count > 1:
        raise UserError(
            f"{SETTING}=ray starts tasks itself: start one process, without torchrun; a search that torchrun has "
            "finished in the directory is not repeated"
        )
    with connected(address, f"{SETTING}=ray", f"{SETTING}.address="):
        yield RayExecutor(cpus, gpus, log)
