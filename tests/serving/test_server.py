"""`prunekit serve` as a process: after SIGTERM under load it answers accepted requests; memory stays flat."""

import re
import signal
import threading
import time
from pathlib import Path

import pytest
from command_line import refused
from interrupting import interrupting
from launching import free_port, launch
from small_mixture import PROMPTS, write_mixture
from small_server import ask
from typer.testing import CliRunner

from prunekit.cli import app, result_commands
from prunekit.serving.server import listening

LIMIT = 240  # seconds


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture") / "run", 2)


@pytest.fixture
def started(run):
    """Yield a function that starts a server process, waits until it is ready, and returns it and its address."""
    processes = []

    def start(*options):
        url = f"http://127.0.0.1:{free_port()}"
        port = url.rpartition(":")[2]
        (process,) = launch(["-m", "prunekit", "serve", run, "--device", "cpu", "--port", port, *options])
        processes.append(process)
        deadline = time.monotonic() + LIMIT
        while "is served at" not in process.printed():
            assert process.is_alive and time.monotonic() < deadline, process.printed()
            time.sleep(0.05)
        while ask(url, path="/health")[0] != 200:
            time.sleep(0.05)
        return process, url

    yield start
    for process in processes:
        process.send(signal.SIGKILL)


@pytest.mark.long
def test_sigterm_under_load(started):
    """Every request is answered or refused: 200, 503, or a refused connection after the server has ended."""
    process, url = started("--max-batch", 2)
    answers, lock = [], threading.Lock()

    def client(number):
        while True:
            try:
                status, content, headers = ask(url, {"prompt": PROMPTS[number], "num_inference_steps": 5, "seed": 1})
            except OSError as error:
                status, content, headers = 0, error, {}
            with lock:
                answers.append((status, content, headers))
            if status != 200:
                return

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while sum(status == 200 for status, *_ in answers) < 3:
        time.sleep(0.01)
    before = len(answers)
    process.send(signal.SIGTERM)
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert process.wait(LIMIT) == 0 and "The server is stopped" in process.printed()
    assert "Traceback" not in process.printed()
    assert sum(status == 200 for status, *_ in answers[before:]) >= 2  # images that were in progress or waiting
    for status, content, headers in answers:
        assert status in (200, 503) or "refused" in str(content) or "reset" in str(content).lower(), content
        assert status != 503 or (headers["Retry-After"] == "5" and "about to end" in content["error"]["message"])
    assert any(status == 503 for status, *_ in answers)


def test_it_serves_until_it_is_interrupted(run, monkeypatch):
    with interrupting() as (say, told):
        monkeypatch.setattr(result_commands, "say", say)
        result = CliRunner().invoke(app, ["serve", str(run), "--port", "0", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"run is served at http://127\.0\.0\.1:\d+ ; Ctrl-C stops it", told[0]) and "stopped" in told[1]


def test_what_cannot_be_served_is_one_line(run, tmp_path):
    with listening("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused("serve", run, "--port", port)
    assert "cannot listen on no.host" in refused("serve", run, "--host", "no.host", "--port", 0)
    assert "not a directory" in refused("serve", tmp_path / "nowhere", "--port", 0)
    assert "neither a run directory" in refused("serve", tmp_path, "--port", 0)
    assert "not usable on this machine" in refused("serve", run, "--port", 0, "--device", "cuda:99")
    assert "raise --max-queued" in refused("serve", run, "--max-queued", 3)
    assert "has no result of method 'norm'" in refused("serve", run, "--port", 0, "--method", "norm")


def resident(process) -> int:
    """Return the proportional set size (PSS) of a process in bytes."""
    text = Path(f"/proc/{process._process.pid}/smaps_rollup").read_text()
    return 1024 * int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[1])


@pytest.mark.long
def test_memory_is_flat_over_500_requests(started):
    process, url = started()

    def ask_all(count):
        def client(start):
            for number in range(start, count, 4):
                body = {"prompt": PROMPTS[number % len(PROMPTS)], "num_inference_steps": 1}
                assert ask(url, body)[0] == 200

        threads = [threading.Thread(target=client, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)

    ask_all(100)
    before = resident(process)
    ask_all(500)
    assert resident(process) - before < 0.03 * before
    process.send(signal.SIGTERM)
    assert process.wait(LIMIT) == 0
