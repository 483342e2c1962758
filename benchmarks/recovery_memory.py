"""Measure time and memory of recovery for Stable Diffusion 2.1 at full size: random weights, 256 px, half the MACs.

    python benchmarks/recovery_memory.py                every case in a separate process; prints a table
    python benchmarks/recovery_memory.py refit          one case: cut, refit, low_rank or fine_tuning

cut: slicing, with the dense model and its slice in memory as `refit` needs them. refit: closed-form fit, layer by
layer, on SAMPLES samples, with the dense model in bfloat16. low_rank and fine_tuning: STEPS steps of BATCH samples in
micro-batches of MICRO, with recomputed activations, the dense model as the teacher, and forward passes in bfloat16.
A case prints one JSON object: seconds of the cut, of the whole refit or of a step (the mean of the steps after the
first), and the peak memory of its process in GiB (resident on a CPU, allocated on a GPU).
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

import prunekit as pk
from prunekit.data.emoji import load_emoji
from prunekit.data.encoded import EncodedData
from prunekit.models import load_shape
from prunekit.recovery.low_rank import LoraConfig

BUDGET, LATENT, TOKENS, PAIRS = 0.5, 32, 77, 32
SAMPLES, LAYERS_AT_ONCE = 16, 4
STEPS, BATCH, MICRO = 3, 4, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dense(dtype: torch.dtype) -> UNet2DConditionModel:
    """Return Stable Diffusion 2.1's UNet with random weights."""
    config = load_shape("sd-2.1").denoiser.config
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        model = UNet2DConditionModel.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False).to(DEVICE)


def sliced(model: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return the UNet cut to the budget at random, in float32."""
    architecture = pk.methods.Random(budget=BUDGET, depth="none").prune(model).architectures[0]
    return pk.slice_model(model, architecture).float()


def data(model: UNet2DConditionModel) -> EncodedData:
    """Return random latents and texts of real captions."""
    images = load_emoji(None, 0.0).take(list(range(PAIRS)))
    count, width = images.num_pairs, model.config.cross_attention_dim
    return EncodedData(
        latents=torch.randn(PAIRS, model.config.in_channels, LATENT, LATENT),
        text=torch.randn(count, TOKENS, width),
        null_text=torch.zeros(TOKENS, width),
        prompts=torch.randn(count, 8),
        images=images,
    )


def cut() -> float:
    """Return the seconds of slicing."""
    model, started = dense(torch.bfloat16), time.perf_counter()
    sliced(model)
    return time.perf_counter() - started


def refit() -> float:
    """Return the seconds of a whole refit."""
    model = dense(torch.bfloat16)
    student = sliced(model)
    config = pk.ClosedFormConfig(
        samples=SAMPLES, batch_size=MICRO, layers_at_once=LAYERS_AT_ONCE, precision="bfloat16", ridges=[1e-2, 1.0]
    )
    started = time.perf_counter()
    fits = pk.refit(student, model, None, config)
    print(f"{len(fits)} layers", file=sys.stderr)
    return time.perf_counter() - started


def tune(lora: LoraConfig | None) -> float:
    """Return the seconds of a fine-tuning step."""
    model, rows = dense(torch.float32), []
    config = pk.FineTuneConfig(
        steps=STEPS,
        batch_size=BATCH,
        micro_batch=MICRO,
        learning_rate=1e-5,
        gradient_checkpointing=True,
        precision="bfloat16",
        log_every=1,
        checkpoint_minutes=1e6,
        lora=lora,
    )
    with TemporaryDirectory() as folder:
        arguments = {"scheduler": DDIMScheduler(prediction_type="v_prediction"), "log": rows.append}
        pk.fine_tune(sliced(model), model, data(model), config, Path(folder), **arguments)
    ends = [row["seconds"] for row in rows if "rate" in row]
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def fine_tuning() -> float:
    """Return the seconds of a step that trains all weights."""
    return tune(None)


def low_rank() -> float:
    """Return the seconds of a step that trains only low-rank changes."""
    return tune(LoraConfig(rank=16))


CASES = {case.__name__: case for case in (cut, refit, low_rank, fine_tuning)}


def main() -> None:
    """Run one case here, or all of them."""
    if len(sys.argv) == 2:
        seconds = CASES[sys.argv[1]]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if DEVICE == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        print(json.dumps({"case": sys.argv[1], "seconds": round(seconds, 2), "peak_gib": round(peak, 2)}))
        return
    rows = []
    for case in CASES:
        done = subprocess.run([sys.executable, __file__, case], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr, flush=True)
    full = rows[-1]["peak_gib"]
    print("| recovery | seconds | peak memory (GiB) | of fine-tuning's |\n|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['case']} | {row['seconds']} | {row['peak_gib']} | {row['peak_gib'] / full:.2f} |")


if __name__ == "__main__":
    main()
