"""Compare the server with the pipeline in one process: throughput, latency, batches, start-up time and memory.

    python benchmarks/serving.py                        the embedded model cut into two experts, about 15 minutes
    python benchmarks/serving.py --model runs/quickstart --clients 1 16 --rates --json serving.json
    python benchmarks/serving.py --engine ray --clients 16 --rates      by one replica on a Ray cluster of this machine

Ray listens on all of a machine's addresses; `unshare --net sh -c "ip link set lo up && python …"` keeps it local.

Closed loop: N clients, each of which sends its next request as soon as it has an answer. Open loop: requests arrive at
a rate, as a Poisson process, whether or not earlier requests are answered; latency counts from the time at which a
request was due. Prompts are captions of the embedded data, routed to all experts.

Each round runs the same prompts through the pipeline in this process, and through the server with every number of
clients, so that other load of the machine affects all alike. Ratios are taken within a round, and the table has their
medians. The server with several clients is compared with the pipeline at the server's largest batch size; the server
with one client is compared with the pipeline prompt by prompt.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil
import torch

import prunekit as pk
from prunekit.data.config import DataConfig, load_data
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.measuring.environment import environment
from prunekit.measuring.interleaved import Ratio, Timing, paired_ratio
from prunekit.methods.router import Router
from prunekit.serving.drawer import open_pipeline

PATH = "/v1/images/generations"
START_LIMIT = 600  # seconds
RAY_PROCESSES = {  # kinds of Ray's processes, by a part of their titles
    "ServeReplica:prunekit:Pool": "replicas",
    "ServeReplica:prunekit:Ingress": "ingress",
    "ServeController": "Serve",
    "ProxyActor": "Serve",
}


@dataclass
class Load:
    """The result of one load: images, refused requests, duration and latencies in seconds, and mean batch size."""

    what: str
    images: int
    refused: int
    seconds: float
    latencies: list[float]
    mean_batch: float
    cpu: float  # CPU seconds of the process that generates the images, and of its descendants

    @property
    def throughput(self) -> float:
        return self.images / self.seconds

    def row(self) -> str:
        latency = Timing(tuple(self.latencies))
        figures = " | ".join(f"{value:.2f}" for value in (latency.p50, latency.p90, latency.p99))
        figures += f" | {self.cpu / self.images:.2f} | {self.mean_batch:.1f}"
        return f"| {self.what} | {self.throughput:.2f} | {figures} | {self.refused} |"


def make_model(folder: Path, experts: int) -> Path:
    """Write a routed directory of the embedded model: experts with 70 % of its units, and a router that uses all."""
    pipeline, encoder = pk.load_pipeline("emoji"), load_prompt_encoder("emoji")
    space = pk.discover(pipeline.unet, "aptp")
    cut = [pk.slice_unet(pipeline.unet, space.random(0.7, seed=seed)) for seed in range(experts)]
    z = encoder.encode(captions(512))
    weight = torch.randn(experts, z.shape[1], generator=torch.Generator().manual_seed(0))
    router = Router(weight, -(z @ weight.T).mean(dim=0))
    pk.PromptRoutedPipeline.from_experts(pipeline, cut, router, encoder, guidance=2.0).save_pretrained(folder)
    return folder


def captions(count: int) -> list[str]:
    """Return at most `count` names of the embedded data's pictures, drawn at random with a fixed seed."""
    names = list(load_data(DataConfig(kind="emoji"), 0).names)
    return random.Random(0).sample(names, min(count, len(names)))


@contextlib.contextmanager
def server(model: Path, given: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Start `prunekit serve`; yield its address, its process id, and its start-up times (s) and memory sizes (MB)."""
    command = [sys.executable, "-m", "prunekit", "serve", str(model), "--port", "0"]
    command += ["--max-batch", str(given.max_batch), "--max-queued", str(given.max_queued)]
    if given.engine == "ray":
        command += ["--engine", "ray", "--ray-address", "local", "--replicas", str(given.replicas)]
    else:
        command += ["--device", given.device]
    started = time.perf_counter()
    equal = {"RAY_worker_niceness": "0"}  # by default, Ray gives replicas a lower CPU priority than the pipeline has
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | equal)
    try:
        while not (found := re.search(r" is served at (http://\S+)", process.stdout.readline())):
            if process.poll() is not None:
                raise RuntimeError("the server has ended")
        url = found[1]
        listening = time.perf_counter() - started
        while httpx.get(f"{url}/health").status_code != 200:
            if time.perf_counter() - started > START_LIMIT:
                raise TimeoutError(f"the server is not ready within {START_LIMIT} s")
            time.sleep(0.05)
        start = {"listening_seconds": listening, "ready_seconds": time.perf_counter() - started}
        start |= {f"ready_pss_mb {name}": size for name, size in memory(process.pid).items()}
        yield url, process.pid, start
        start |= {f"loaded_pss_mb {name}": size for name, size in memory(process.pid).items()}
    finally:
        process.terminate()
        process.wait(120)


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def memory(pid: int) -> dict[str, float]:
    """Return the proportional set sizes in MB of a server's processes, by kind of process."""
    sizes: dict[str, float] = {}
    for process in family(pid):
        with contextlib.suppress(psutil.Error, OSError, TypeError):  # the process has just ended
            title = " ".join(process.cmdline())
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            size = int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[1]) / 1024
            own = "the command" if process.pid == pid else "Ray"
            name = next((what for title_part, what in RAY_PROCESSES.items() if title_part in title), own)
            sizes[name] = sizes.get(name, 0.0) + size
    return sizes


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and of all its descendants."""
    total = 0.0
    for process in family(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


class Client:
    """Sends requests to the server, and records latencies and refusals."""

    def __init__(self, http: httpx.AsyncClient, given: argparse.Namespace):
        self.http, self.given = http, given
        self.latencies: list[float] = []
        self.refused = 0

    async def ask(self, prompt: str, due: float | None = None) -> None:
        """Request one image; its latency counts from the time `due`, by default now."""
        due = time.perf_counter() if due is None else due
        await asyncio.sleep(max(0, due - time.perf_counter()))
        body = {"prompt": prompt, "seed": 0, "num_inference_steps": self.given.steps}
        answer = await self.http.post(PATH, json=body)
        if answer.status_code == 200:
            self.latencies.append(time.perf_counter() - due)
        elif answer.status_code == 503:
            self.refused += 1
        else:
            raise RuntimeError(answer.text)

    async def closed_loop(self, clients: int, prompts: list[str]) -> None:
        """Share prompts among clients; each client sends its next request as soon as it has an answer."""
        line = iter(prompts)

        async def one() -> None:
            for prompt in line:
                await self.ask(prompt)

        await asyncio.gather(*(one() for _ in range(clients)))

    async def open_loop(self, rate: float, prompts: list[str]) -> None:
        """Request prompts at `rate` per second on average, whether or not earlier requests are answered."""
        generator, due = random.Random(1), time.perf_counter()
        times = [due := due + generator.expovariate(rate) for _ in prompts]
        await asyncio.gather(*(self.ask(*one) for one in zip(prompts, times, strict=True)))

    async def counters(self, pid: int) -> tuple[float, float, float]:
        """Return the numbers of images and batches that the server has generated, and its CPU seconds.

        An image in a batch of size b counts as 1/b of a batch.
        """
        images = batches = 0.0
        for line in (await self.http.get("/metrics")).text.splitlines():
            if found := re.match(r'prunekit_image_batch_size_bucket\{le="([\d.]+)"\} (\S+)', line):
                size, below, images = float(found[1]), images, float(found[2])
                batches += (images - below) / size
        return images, batches, cpu_seconds(pid)


def loaded(url: str, pid: int, what: str, given: argparse.Namespace, work: Callable[[Client], Awaitable[None]]) -> Load:
    """Run `work` with a client of the server, and return the result as a load named `what`."""

    async def main() -> Load:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
            client = Client(http, given)
            before, started = await client.counters(pid), time.perf_counter()
            await work(client)
            seconds, after = time.perf_counter() - started, await client.counters(pid)
            images, batches, cpu = (new - old for new, old in zip(after, before, strict=True))
            mean = images / max(batches, 1e-9)
            return Load(what, len(client.latencies), client.refused, seconds, client.latencies, mean, cpu)

    return asyncio.run(main())


def direct(pipeline: pk.PromptRoutedPipeline, what: str, prompts: list[str], batch: int, steps: int) -> Load:
    """Generate images with the pipeline in this process: in one call, or, at batch 1, one prompt after another."""
    calls = [prompts] if batch > 1 else [[prompt] for prompt in prompts]
    latencies, cpu = [], time.process_time()
    for call in calls:
        started = time.perf_counter()
        pipeline(call, num_inference_steps=steps, seeds=0, batch_size=batch)
        latencies += [time.perf_counter() - started] * len(call)
    counts = Counter(pipeline.route(prompts).tolist()).values()
    batches = sum(-(-count // batch) for count in counts) if batch > 1 else len(prompts)
    seconds = sum(latencies) / len(calls[0])
    return Load(what, len(prompts), 0, seconds, latencies, len(prompts) / batches, time.process_time() - cpu)


def clients_of(count: int) -> str:
    return f"server, {count} client{'s' * (count > 1)}"


def compare(url: str, pid: int, pipeline: pk.PromptRoutedPipeline, given: argparse.Namespace) -> dict[str, list[Load]]:
    """Measure every round, then the open loops once; return the loads by name, one per round."""
    loads: dict[str, list[Load]] = {}
    many, few = captions(given.images), captions(given.images)[: given.single]
    for turn in range(given.rounds):
        arms = [lambda: direct(pipeline, f"pipeline, batch {given.max_batch}", many, given.max_batch, given.steps)]
        arms.append(lambda: direct(pipeline, "pipeline, one by one", few, 1, given.steps))
        for clients in given.clients:
            work = partial(Client.closed_loop, clients=clients, prompts=few if clients == 1 else many)
            arms.append(partial(loaded, url, pid, clients_of(clients), given, work))
        for arm in arms if turn % 2 == 0 else reversed(arms):
            load = arm()
            loads.setdefault(load.what, []).append(load)
            print(f"round {turn + 1}: {load.row()}", file=sys.stderr, flush=True)
    capacity = statistics.median(load.throughput for load in loads[f"pipeline, batch {given.max_batch}"])
    for share in given.rates:
        work = partial(Client.open_loop, rate=share * capacity, prompts=many)
        load = loaded(url, pid, f"server, open loop, {share:g} of the pipeline's throughput", given, work)
        loads[load.what] = [load]
    return loads


def pooled(loads: list[Load]) -> Load:
    """Return the rounds of one load combined into one, with all latencies and the median throughput."""
    latencies = [latency for load in loads for latency in load.latencies]
    images, refused = sum(load.images for load in loads), sum(load.refused for load in loads)
    mean = statistics.mean(load.mean_batch for load in loads)
    seconds = images / statistics.median(load.throughput for load in loads)
    cpu = images * statistics.median(load.cpu / load.images for load in loads)
    return Load(loads[0].what, images, refused, seconds, latencies, mean, cpu)


def ratios(loads: dict[str, list[Load]], given: argparse.Namespace) -> dict[str, Ratio]:
    """Return the server's figures divided by the pipeline's, paired by rounds.

    CPU time counts all processes of the server; on a busy machine it is steadier than wall-clock time.
    """

    def ratio(figure: Callable[[Load], float], own: str, other: str) -> Ratio:
        return paired_ratio([figure(load) for load in loads[own]], [figure(load) for load in loads[other]])

    found = {}
    for clients in given.clients:
        own, other = clients_of(clients), f"pipeline, batch {given.max_batch}"
        if clients == 1:
            other = "pipeline, one by one"
            latency = ratio(lambda load: statistics.median(load.latencies), own, other)
            found[f"median latency: {own} / {other}"] = latency
        else:
            found[f"throughput: {own} / {other}"] = ratio(lambda load: load.throughput, own, other)
        found[f"CPU time of an image: {own} / {other}"] = ratio(lambda load: load.cpu / load.images, own, other)
    return found


def main() -> None:
    """Measure, and print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a run, an export or a pipeline; by default one is created")
    parser.add_argument("--experts", type=int, default=2, help="number of experts of the created model")
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--replicas", type=int, default=1, help="number of replicas of the engine ray")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 0.8], help="as shares of pipeline throughput")
    parser.add_argument("--images", type=int, default=64, help="images of a load with several clients")
    parser.add_argument("--single", type=int, default=8, help="images of the load with one client")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--max-queued", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write all results to this JSON file")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or make_model(Path(folder) / "model", given.experts)
        with server(model, given) as (url, pid, start):
            pipeline = open_pipeline(model, None, given.device)
            pipeline.set_progress_bar_config(disable=True)
            for prompt in captions(8 * pipeline.num_experts):  # loads experts, and counts their MACs
                pipeline(prompt, num_inference_steps=1, seeds=0)
            loads = compare(url, pid, pipeline, given)
    found = ratios(loads, given)
    where = environment(given.device)
    print(f"{where['device']}, load {where['load']}; {pipeline.num_experts} experts, {given.steps} steps\n")
    print("| load | images/s | p50 (s) | p90 | p99 | CPU s/image | mean batch | refused |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for rounds in loads.values():
        print(pooled(rounds).row())
    print(f"\n| ratio, median of {given.rounds} interleaved rounds | value [95 % interval] |\n|---|---:|")
    for name, ratio in found.items():
        print(f"| {name} | {ratio} |")
    print("\n| start and memory | |\n|---|---:|")
    for name, value in start.items():
        print(f"| {name} | {value:.1f} |")
    if given.json is not None:
        content = {"environment": where, "start": start, "ratios": {name: asdict(own) for name, own in found.items()}}
        content["loads"] = {name: [asdict(load) for load in rounds] for name, rounds in loads.items()}
        given.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
