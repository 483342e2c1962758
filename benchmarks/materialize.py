"""Compare opening an expert of a shared backbone with opening a separate expert: time, disk and peak memory.

The experts keep half of the MACs of Stable Diffusion 2.1's shape with random weights, or of the embedded model. Each is
opened several times, in turn, in a new process, with its files in the system's cache.
Run: python benchmarks/materialize.py [--model sd-2.1 | emoji] [--times 5]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import prunekit as pk
from prunekit.core.slicing import save_member
from prunekit.jobs.bench.bench_models import random_unet
from prunekit.methods import select
from prunekit.models import load_pipeline

OPEN = """
import re, sys, time
from pathlib import Path
import prunekit as pk
def memory(name): return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
before = memory("VmRSS")
start = time.perf_counter()
unet = pk.PrunedUNet2DConditionModel.from_pretrained(sys.argv[1])
total = sum(float(p.sum()) for p in unet.parameters())  # reads every weight: files are mapped, not read, at first
seconds = time.perf_counter() - start
print(seconds, memory("VmHWM") - before, unet.num_parameters())
"""


def opened(folder: Path) -> tuple[float, float, int]:
    """Open a UNet in a new process; return the seconds, the process's peak growth in GiB, and the parameters."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True)
    seconds, memory, parameters = done.stdout.split()[-3:]
    return float(seconds), float(memory), int(parameters)


def size(folder: Path) -> float:
    """Return a folder's size in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("sd-2.1", "emoji"), default="sd-2.1")
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    own = given.model == "emoji"
    unet = load_pipeline("emoji").unet if own else random_unet("sd-2.1", torch.device("cpu"), torch.float32, 0)
    space = pk.discover(unet)
    scores = torch.rand(space.size, generator=torch.Generator().manual_seed(0))
    architecture = select(scores, pk.CostModel(unet, space), 0.5)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in ("backbone", "of a shared backbone", "of its own")}
        unet.save_pretrained(folders["backbone"])
        folders["of a shared backbone"].mkdir()
        save_member(unet, architecture, folders["of a shared backbone"], folders["backbone"])
        pk.slice_unet(unet, architecture).save_pretrained(folders["of its own"])
        del unet
        print(f"{given.model}: the dense UNet takes {size(folders['backbone']):,.1f} MB")
        rows = {name: [] for name in list(folders)[1:]}
        for _ in range(given.times):
            for name, found in rows.items():
                found.append(opened(folders[name]))
        print(
            "| an expert | disk (MB) | opened in (s) | memory grows by (GiB) | parameters |\n|---|---:|---:|---:|---:|"
        )
        for name, found in rows.items():
            seconds, memory = (statistics.median(one[i] for one in found) for i in (0, 1))
            print(f"| {name} | {size(folders[name]):,.2f} | {seconds:.2f} | {memory:.2f} | {found[0][2]:,} |")


if __name__ == "__main__":
    main()
