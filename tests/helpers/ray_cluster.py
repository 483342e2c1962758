"""A Ray cluster on this machine that no other machine can reach: it has a separate loopback interface.

Its processes run in Linux namespaces and end when the first process ends. The head runs no tasks; each node has 1 CPU.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

ADDRESS = "127.0.0.1:6379"
MEMORY = 80_000_000  # bytes of a node's object store
NEEDED = ("unshare", "nsenter", "ip")
BIN = Path(sys.executable).parent
ROOM = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]


def why_not() -> str | None:
    """Return why such a cluster cannot run here, or None if it can."""
    if not (BIN / "ray").is_file():
        return "ray is not installed"
    if missing := [program for program in NEEDED if shutil.which(program) is None]:
        return f"namespaces need {', '.join(missing)}"
    done = subprocess.run(["unshare", *ROOM, "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
    return None if done.returncode == 0 else "namespaces cannot be made here"


class Cluster:
    """A context with a head and nodes that tests add and kill. dashboard: start the dashboard, for `serve deploy`."""

    def __init__(self, dashboard: bool = False) -> None:
        self._dashboard = dashboard
        # Ray's sockets need a short path, and its token must not be in the user's home
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self._nodes: list[Command] = []
        stay = "ip link set lo up && while sleep 3600; do :; done"
        spaces = [*ROOM, "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._first = subprocess.Popen(["unshare", *spaces, "sh", "-c", stay])
        _until(lambda: psutil.Process(self._first.pid).children())
        self._space = psutil.Process(self._first.pid).children()[0].pid
        _until(lambda: ",UP" in self.run("ip", "link", "show", "lo").output())

    def __enter__(self) -> "Cluster":
        self._head = self._node("--head", "--port", ADDRESS.rpartition(":")[2], cpus=0)
        return self

    def __exit__(self, *error: object) -> None:
        self._first.send_signal(signal.SIGKILL)
        self._first.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add_node(self) -> "Command":
        """Start a node of one CPU; return it when it has joined."""
        node = self._node("--address", ADDRESS, cpus=1)
        self._nodes.append(node)
        return node

    def holder(self, lock: Path, command: "Command") -> tuple["Command", psutil.Process]:
        """Wait, while a command runs, until a process holds a lock file (path or pattern); return its node and it."""
        while command.is_alive:
            for node in self.nodes:
                for process in node.family():
                    if any(Path(name).match(str(lock)) for name in _open_files(process)):
                        return node, process
        raise AssertionError(f"no node held {lock}: {command.output()}")

    @property
    def nodes(self) -> list["Command"]:
        """The running nodes, without the head."""
        return [node for node in self._nodes if node.is_alive]

    def family(self) -> list[psutil.Process]:
        """Return the processes of the head and of the running nodes."""
        return [process for node in (self._head, *self.nodes) for process in node.family()]

    def start(self, *command: str, folder: Path | None = None) -> "Command":
        """Start a command in the cluster's network, in a folder."""
        return Command(self._inside(folder or self.folder) + list(command), self._environment())

    def run(self, *command: str, folder: Path | None = None) -> "Command":
        """Run a command in the cluster's network, and wait until it ends."""
        started = self.start(*command, folder=folder)
        started.wait()
        return started

    def _inside(self, folder: Path) -> list[str]:
        spaces = ["--net", "--pid", "--mount", *(["--user", "--preserve-credentials"] if ROOM else [])]
        return ["nsenter", "--target", str(self._space), *spaces, "env", f"--chdir={folder}"]

    def _node(self, *options: str, cpus: int) -> "Command":
        dashboard = ["--include-dashboard", str(self._dashboard).lower(), "--dashboard-host", "127.0.0.1"]
        more = [] if "--address" in options else [*dashboard, "--temp-dir", str(self.folder)]
        common = ["--node-ip-address", "127.0.0.1", "--object-store-memory", str(MEMORY), "--disable-usage-stats"]
        command = [str(BIN / "ray"), "start", *options, *more, *common, "--num-cpus", str(cpus), "--block"]
        node = self.start(*command)
        _until(lambda: "Ray runtime started" in node.output())
        return node

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(self.folder), "RAY_ADDRESS": ADDRESS}
        return own | {"RAY_worker_niceness": "0"}


class Command:
    """A process in the cluster's namespaces, and its output."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self._printed = tempfile.NamedTemporaryFile()  # noqa: SIM115 - gone with this object
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=self._printed, stderr=subprocess.STDOUT
        )

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def wait(self, timeout: float = 600) -> int:
        """Wait until the process ends; return its exit code (nsenter's code if a signal ended it)."""
        return self._process.wait(timeout)

    def output(self) -> str:
        """Return the output so far."""
        return Path(self._printed.name).read_text(encoding="utf-8", errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command's process, not to nsenter."""
        self.family()[1].send_signal(number)

    def kill_all(self) -> None:
        """Kill the process and all its descendants, as if a node lost power."""
        for process in self.family():
            process.kill()
        self._process.wait()

    def family(self) -> list[psutil.Process]:
        """Return the process and all its descendants."""
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]


def _open_files(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):  # the process has just ended
        return [file.path for file in process.open_files()]
    return []


def _until(is_so: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "the cluster does not start"
        time.sleep(0.2)
