"""Start prunekit's HTTP server, if this version has one, and request pictures from it."""

import base64
import importlib.util
import io
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MODULE, PATH = "prunekit.serving.api", "/v1/images/generations"
START_SECONDS, ANSWER_SECONDS = 240, 120


def is_there() -> bool:
    """Return whether this version has a server and fastapi is installed."""
    return importlib.util.find_spec(MODULE) is not None and importlib.util.find_spec("fastapi") is not None


@contextmanager
def serving(folder: Path, device: torch.device) -> Iterator[str]:
    """Serve a routed directory on a device; yield the server's address once it is ready."""
    command = [sys.executable, "-m", "prunekit", "serve", str(folder), "--port", "0", "--device", device.type]
    process = subprocess.Popen([*command, "--deterministic"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://[^\s/]+", line)
        assert found is not None, f"the server printed no address: {line!r}"
        deadline = time.monotonic() + START_SECONDS
        while not _is_ready(found[0]):
            if time.monotonic() > deadline or process.poll() is not None:
                raise TimeoutError(f"the server was not ready within {START_SECONDS} s")
            time.sleep(0.2)
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)


def picture(address: str, prompt: str, seed: int, steps: int) -> Tensor:
    """Request a picture for a prompt; return it as (3, H, W), from 0 to 1."""
    body = json.dumps({"prompt": prompt, "seed": seed, "num_inference_steps": steps}).encode()
    request = urllib.request.Request(f"{address}{PATH}", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        content = json.load(answer)["data"][0]["b64_json"]
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
