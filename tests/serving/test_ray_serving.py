"""The server on a Ray cluster with lost replicas, nodes and clients: every image is the pipeline's image."""

import asyncio
import base64
import io
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
import yaml
from PIL import Image
from ray_cluster import Cluster, why_not
from ray_serving import INGRESS, Served, title
from small_mixture import PROMPTS, write_mixture

from prunekit import PromptRoutedPipeline
from prunekit.serving import Job
from prunekit.serving.api import GENERATIONS

BIN = Path(sys.executable).parent
PRUNEKIT, SERVE = str(BIN / "prunekit"), str(BIN / "serve")
OPTIONS = ("--deterministic", "--max-steps", "999", "--max-queued", "10", "--name", "small")
SERVER = ("--engine", "ray", "--replicas", "2", *OPTIONS)
STEPS, LONG = 300, 900  # steps of an image that takes about 1 s, and of one that takes several seconds

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster():
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(dashboard=True) as started:
        for _ in range(2):
            started.add_node()
        yield started


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture") / "run", 2)


@pytest.fixture(scope="module")
def expected(run):
    """Yield a cached function from prompt, steps and seed to the bytes of the pipeline's image, and its expert."""
    pipeline = PromptRoutedPipeline.from_pretrained(run, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    known, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # like a replica with one CPU, as bytes depend on the number of threads

    def draw(prompt, steps, seed):
        if (prompt, steps, seed) not in known:
            output = pipeline(prompt, num_inference_steps=steps, seeds=seed)
            known[prompt, steps, seed] = output.images[0].tobytes(), output.experts[0]
        return known[prompt, steps, seed]

    yield draw
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def served(cluster, run):
    """Yield a server with two replicas, one per node."""
    command = cluster.start(PRUNEKIT, "serve", str(run), *SERVER)
    server = Served(cluster, command)
    server.until(lambda: "small is served at" in command.output())
    yield server
    if command.is_alive:
        command.send(signal.SIGTERM)
        command.wait()
    server.close()


@pytest.fixture
def ready(served):
    """Return the server when both replicas are ready and idle."""
    served.until(lambda: len(served.replicas()) == 2 and served.is_ready())
    served.until(lambda: len(both_draw(served)) == 2)
    served.until(lambda: not served.running())
    return served


def both_draw(served):
    """Keep the replicas busy for a moment; return the batches that were in progress."""
    asked = Asked(served, [{"prompt": text, "num_inference_steps": STEPS} for text in PROMPTS[:6]])
    time.sleep(1.5)
    seen = served.running()
    asked.wait()
    return seen


class Asked:
    """Concurrent requests, each in a thread; `answers` is keyed by the number of the request."""

    def __init__(self, served, bodies, client=None):
        self.bodies, self.answers, self._served, self._client = bodies, {}, served, client
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(len(bodies))]
        for thread in self.threads:
            thread.start()

    def _ask(self, number):
        try:
            body, client = self.bodies[number], self._client
            answer = self._served.draw(**body) if client is None else client.post(GENERATIONS, json=body)
            self.answers[number] = answer
        except httpx.HTTPError as error:
            self.answers[number] = error

    def wait(self):
        """Wait for all requests; return the answers in the order of the requests."""
        for thread in self.threads:
            thread.join(240)
            assert not thread.is_alive()
        return [self.answers[number] for number in range(len(self.bodies))]


def bodies(count, steps):
    return [{"prompt": PROMPTS[n % 12], "seed": n % 3, "num_inference_steps": steps} for n in range(count)]


def check(body, answer, expected):
    """Check that the answer is the pipeline's image, and that its expert generated it."""
    assert isinstance(answer, httpx.Response) and answer.status_code == 200, getattr(answer, "text", answer)
    (data,) = answer.json()["data"]
    image = Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))
    assert (image.tobytes(), data["expert"]) == expected(body["prompt"], body["num_inference_steps"], body["seed"])


def test_a_killed_replica_loses_no_request(ready, expected):
    asked = Asked(ready, bodies(6, LONG))
    ready.until(lambda: len(ready.running()) == 2)
    ready.replicas()[0].kill()
    for body, answer in zip(asked.bodies, asked.wait(), strict=True):
        check(body, answer, expected)
    metrics = ready.get("/metrics").text
    assert 'prunekit_requests_total{path="/v1/images/generations",status="200"}' in metrics
    assert "prunekit_queue_images 0.0" in metrics and 'status="500"' not in metrics
    ready.until(lambda: len(ready.replicas()) == 2)


def test_a_killed_node_loses_no_request(ready, cluster, expected):
    (node,) = [node for node in cluster.nodes if not holds_ingress(node)][:1]
    assert len(ready.replicas(node)) == 1
    asked = Asked(ready, bodies(6, LONG))
    ready.until(lambda: len(ready.running()) == 2)
    node.kill_all()
    cluster.add_node()
    for body, answer in zip(asked.bodies, asked.wait(), strict=True):
        check(body, answer, expected)


def holds_ingress(node):
    return any(title(process).startswith(INGRESS) for process in node.family())


def test_a_killed_ingress_answers_with_errors_and_comes_back(ready, expected):
    asked = Asked(ready, bodies(4, LONG))
    ready.until(lambda: len(ready.running()) == 2)
    (ingress,) = ready.processes(INGRESS)
    ingress.kill()
    later = {"prompt": PROMPTS[5], "num_inference_steps": 4, "seed": 2}
    check(later, ready.draw(**later), expected)  # it waits for the next ingress
    for answer in asked.wait():
        assert isinstance(answer, httpx.Response) and 500 <= answer.status_code < 600, answer


def test_a_job_is_stopped_when_its_client_leaves(ready, expected):
    with pytest.raises(httpx.ReadTimeout):  # two images in progress, and two waiting
        ready.draw(timeout=2, prompt=PROMPTS[0], n=10, num_inference_steps=LONG)
    left = time.monotonic()
    ready.until(lambda: not ready.running() and ready.get("/health").json()["waiting"] == 0)
    assert time.monotonic() - left < 10, "ten images of several seconds each are not drawn"
    body = {"prompt": PROMPTS[0], "num_inference_steps": 3, "seed": 1}
    check(body, ready.draw(**body), expected)


def test_a_full_queue_refuses_with_503(ready, expected):
    asked = Asked(ready, bodies(60, 50))
    answers = asked.wait()
    drawn = [number for number, answer in enumerate(answers) if getattr(answer, "status_code", 0) == 200]
    assert 22 <= len(drawn) < 60  # at least the capacity of two replicas and their queues
    for number in drawn:
        check(asked.bodies[number], answers[number], expected)
    for answer in (answer for number, answer in enumerate(answers) if number not in drawn):
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["code"] == "overloaded"
    too_many = ready.draw(prompt=PROMPTS[0], n=11)
    assert too_many.status_code == 400


def test_what_the_cluster_cannot_serve_is_one_line(ready, cluster, run, tmp_path):
    free = ("--port", "8001")

    def line(*words):
        command = cluster.run(PRUNEKIT, "serve", *words)
        (said,) = [line for line in command.output().splitlines() if line.startswith("prunekit:")]
        return said

    assert "already runs on this cluster" in line(str(run), *SERVER, *free)
    assert "cannot listen on" in line(str(run), *SERVER)
    assert "neither a run" in line(str(tmp_path), *SERVER, *free)


def test_replicas_that_hold_the_expert_are_preferred():
    """The preference is a hint: these replicas come first, unless more than a batch waits for them; others follow."""
    if reason := why_not():
        pytest.skip(reason)
    from ray.serve.request_router import PendingRequest

    from prunekit.serving.ray_backend import ResidentFirst

    def chosen(stats, *arguments):
        router, replicas = ResidentFirst.__new__(ResidentFirst), [SimpleNamespace(routing_stats=own) for own in stats]
        router.initialize_state(max_batch=2)

        async def choose():
            return await router.choose_replicas(replicas, PendingRequest(list(arguments), {}, None))

        return [[replicas.index(replica) for replica in rank] for rank in asyncio.run(choose())]

    stats = [{"resident": [0], "waiting": 0}, {"resident": [1], "waiting": 2}, {"resident": [1], "waiting": 3}, {}]
    job = Job("red apple", (0,), 2, 2.0, (64, 64), expert=1)
    assert chosen(stats, job) == [[1], [0, 2, 3]]
    assert chosen(stats, replace(job, expert=0)) == [[0], [1, 2, 3]]
    assert chosen(stats, replace(job, expert=5)) == [[], [0, 1, 2, 3]]
    assert chosen(stats) == [[], [0, 1, 2, 3]]  # a request that is not a job


def test_sigterm_under_load(ready, expected):
    """Every request is answered or refused: 200, 503, or 404 and refused connections after the server has ended."""
    command, stop, seen = ready.command, threading.Event(), []

    def client(number):
        body = {"prompt": PROMPTS[number], "num_inference_steps": STEPS, "seed": number}
        while not stop.is_set():
            try:
                answer = ready.draw(**body)
            except httpx.HTTPError as error:
                answer = error
            seen.append((body, answer))
            if getattr(answer, "status_code", 0) != 200:
                return

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    ready.until(lambda: len(seen) >= 3)
    before = len(seen)
    command.send(signal.SIGTERM)
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive()
    stop.set()
    assert command.wait() == 0 and "The server is stopped" in command.output()
    assert "Traceback" not in command.output()
    after = [answer for _, answer in seen[before:]]
    assert sum(getattr(answer, "status_code", 0) == 200 for answer in after) >= 2  # in progress or waiting before
    for body, answer in seen:
        if getattr(answer, "status_code", 0) == 200:
            check(body, answer, expected)
        elif isinstance(answer, httpx.Response):
            assert answer.status_code in (404, 503), answer.text
            assert answer.status_code == 404 or "about to end" in answer.json()["error"]["message"]
        else:
            assert isinstance(answer, httpx.ConnectError | httpx.RemoteProtocolError | httpx.ReadError), answer


def test_the_written_file_can_be_deployed(cluster, run, expected, tmp_path):
    file = tmp_path / "serve.yaml"
    words = ("--write-config", str(file), "--replicas", "1:2", "--gpus-per-replica", "0", "--api-key", "secret")
    written = cluster.run(PRUNEKIT, "serve", str(run), *OPTIONS, "--max-resident", "1", *words)
    assert "is written" in written.output() and "secret" not in file.read_text()
    content = yaml.safe_load(file.read_text())
    for deployment in content["applications"][0]["deployments"]:  # the key from the nodes' environment
        deployment["ray_actor_options"]["runtime_env"] = {"env_vars": {"PRUNEKIT_API_KEY": "secret"}}
    file.write_text(yaml.safe_dump(content))
    deployed = cluster.run(SERVE, "deploy", str(file), "--address", "http://127.0.0.1:8265")
    assert deployed.wait() == 0, deployed.output()
    server = Served(cluster)
    try:
        server.until(server.is_ready)
        body = {"prompt": PROMPTS[3], "num_inference_steps": 5, "seed": 7}
        assert server.draw(**body).status_code == 401
        with server.client(headers={"Authorization": "Bearer secret"}, timeout=240) as client:
            for prompt in PROMPTS[:8]:
                answer = client.post(GENERATIONS, json={**body, "prompt": prompt})
                check({**body, "prompt": prompt}, answer, expected)
            assert len(server.replicas()) == 1
            asking = Asked(server, bodies(11, LONG), client)
            server.until(lambda: len(server.replicas()) == 2)  # two batches of requests start a replica
            for long, answer in zip(asking.bodies, asking.wait(), strict=True):
                check(long, answer, expected)
    finally:
        server.close()
        ended = cluster.run(SERVE, "shutdown", "--yes", "--address", "http://127.0.0.1:8265")
        assert ended.wait() == 0, ended.output()
