"""The environment of a measured time, besides the code: device, driver, versions, threads and precision flags."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from prunekit.runtime.precision import CPU_INFO, resolve_precision

SAME = ("device", "driver", "torch", "diffusers", "cuda", "threads")  # rows that differ in these are measured again


def environment(device: str | torch.device) -> dict[str, Any]:
    """Return a JSON record of the environment in which a row is measured."""
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "kind": device.type,
        "driver": _driver() if is_cuda else None,
        "cuda": torch.version.cuda if is_cuda else None,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32 if is_cuda else None,
        "precision": resolve_precision("auto", device),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **{name: _version(name) for name in ("torch", "diffusers", "transformers", "triton", "prunekit")},
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def device_name(device: str | torch.device) -> str:
    """Return a device's name: the GPU's, or the processor's with the threads in use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'' if threads == 1 else 's'}"


def folder_name(device: str | torch.device) -> str:
    """Return a device's name in a form that suits a folder."""
    return re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")


def _processor() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
