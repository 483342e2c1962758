"""Options, models and the printed table of the scripts that compare implementations."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from prunekit.jobs.bench.bench_models import random_unet
from prunekit.measuring.environment import environment
from prunekit.measuring.interleaved import Measurement, WarmUp, measure


def options(description: str, **defaults: Any) -> argparse.Namespace:
    """Parse --pairs, and an option --NAME for every default, with the default's type."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=9, help="interleaved samples of each arm")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    return parser.parse_args()


def sd21(dtype: str = "float32") -> UNet2DConditionModel:
    """Return Stable Diffusion 2.1's UNet with random weights, frozen."""
    return random_unet("sd-2.1", torch.device("cpu"), getattr(torch, dtype), 0)


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return another UNet that shares the weights."""
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        other = type(unet)(**config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def compare(
    title: str, arms: Mapping[str, Callable[[], Any]], pairs: int, warmup_seconds: float = 20.0, device: Any = "cpu"
) -> Measurement:
    """Time arms in turn on a device; print their times, their ratios to the first arm, and the noise floor."""
    measured = measure(arms, pairs, device, WarmUp(max_seconds=warmup_seconds))
    print(f"\n{title}", *measured.lines(), sep="\n", flush=True)
    return measured


def where() -> None:
    """Print the machine and the versions of the packages."""
    here = environment("cpu")
    print(", ".join(f"{key} {here[key]}" for key in ("device", "cores", "load", "torch", "diffusers", "python")))
