"""What a run will take, from shapes alone: UNet passes, memory, disk, and seconds at a device's measured speed."""

import copy
import time
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from prunekit.data.config import data_size as data_size
from prunekit.training.trainer import TrainerConfig

FLOAT32 = 4  # bytes
MOST_RUN_PARAMS = 50_000_000  # a UNet of fewer parameters is itself timed; for a larger one a matrix product is
SAVED_PER_OUTPUT = 1.1  # what autograd saves over the outputs of all leaf layers: measured 1.09 on SD 2's topology


@dataclass(frozen=True)
class Work:
    """One stage: samples, and the MACs of one sample with all its passes (None where they are not counted)."""

    stage: str
    samples: int
    macs_per_sample: float | None
    passes: str

    @property
    def macs(self) -> float | None:
        """MACs of the stage."""
        return None if self.macs_per_sample is None else self.samples * self.macs_per_sample


@dataclass(frozen=True)
class Speed:
    """MACs per second of a device, and where the figure comes from."""

    macs_per_second: float
    source: str


def training_bytes(params: int, config: TrainerConfig) -> int:
    """Bytes of the weights in training: float32 weight, gradient, AdamW's two moments, and an average where kept."""
    return params * FLOAT32 * (4 + (config.ema is not None))


def checkpoint_bytes(params: int, config: TrainerConfig) -> int:
    """Bytes of one checkpoint: weight, two moments, and an average where kept."""
    return params * FLOAT32 * (3 + (config.ema is not None))


def activation_bytes(unet: UNet2DConditionModel, size: tuple[int, int], text_length: int, config: TrainerConfig) -> int:
    """Bytes that autograd saves for the backward pass of one micro-batch: every leaf layer's output, and a tenth.

    The UNet is on the meta device. Under bfloat16 autocast half of that is taken.
    """
    total = 0

    def add(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(output, torch.Tensor):
            total += output.nbytes

    hooks = [m.register_forward_hook(add) for m in unet.modules() if next(m.children(), None) is None]
    try:
        call(unet, size, text_length, "meta")
    finally:
        for hook in hooks:
            hook.remove()
    share = 0.5 if config.precision == "bfloat16" else 1.0
    return int(SAVED_PER_OUTPUT * share * total) * (config.micro_batch or config.batch_size)


@torch.no_grad()
def call(unet: UNet2DConditionModel, size: tuple[int, int], text_length: int, device: str, batch: int = 1) -> None:
    """Run a UNet once on zeros of the latent `size` (h, w)."""
    width = unet.config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    conditions = None
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        conditions = {
            "text_embeds": torch.zeros(batch, pooled, device=device),
            "time_ids": torch.zeros(batch, 6, device=device),
        }
    unet(
        torch.zeros(batch, unet.config.in_channels, *size, device=device),
        torch.ones(batch, dtype=torch.long, device=device),
        torch.zeros(batch, text_length, width, device=device),
        added_cond_kwargs=conditions,
    )


def measure_speed(
    unet: UNet2DConditionModel, macs: int, size: tuple[int, int], text_length: int, precision: str
) -> Speed:
    """Time this machine for about a second: the UNet itself where it is small, else a matrix product.

    unet: on the meta device; a small one is copied with zeros for weights. macs: of one sample at `size`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if sum(p.numel() for p in unet.parameters()) <= MOST_RUN_PARAMS:
        model, batch = copy.deepcopy(unet).to_empty(device=device), 8
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            seconds = _time(lambda: call(model, size, text_length, device, batch), device)
        what = f"this UNet's forward pass in {precision} with zeros for weights, batch {batch}"
        return Speed(batch * macs / seconds, f"measured on {name}: {what}")
    side, dtype = 1024, getattr(torch, precision)
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = _time(lambda: a @ b, device)
    what = (
        f"a {side} x {side} matrix product in {precision}, which a UNet does not reach: take the times as lower bounds"
    )
    return Speed(side**3 / seconds, f"measured on {name}: {what}")


def _time(function, device: str) -> float:
    """Return the seconds of the fastest of up to five calls after one to warm up, within about a second."""
    times: list[float] = []
    while len(times) < 6 and sum(times) < 1.0:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:] or times)
