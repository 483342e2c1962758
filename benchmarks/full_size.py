"""Measure search and fine-tuning steps of Stable Diffusion 2.1 at full size, with random weights, at 256 pixels.

    python benchmarks/full_size.py              every case in a separate process; prints a table
    python benchmarks/full_size.py search bfloat16
    python benchmarks/full_size.py fine_tuning float32
    python benchmarks/full_size.py cache bfloat16           fine-tuning from the cache, and with live encoders
    python benchmarks/full_size.py cache_emoji bfloat16     the same for the embedded model

A case prints one JSON object: seconds per step (the mean of the steps after the first), and peak memory of the process
in GiB (resident on a CPU, allocated on a GPU). The pipeline is built from published shapes; nothing is downloaded.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import prunekit as pk
from prunekit.data.cache_config import CacheConfig
from prunekit.data.emoji import load_emoji
from prunekit.data.encoded import EncodedData, encode
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.methods import APTP
from prunekit.methods.base import space_and_cost
from prunekit.methods.budget import select_mixture
from prunekit.models import emoji_model, load_pipeline, load_shape
from prunekit.recovery.fine_tuning import FineTuneConfig, fine_tune
from prunekit.runtime.randomness import generator

CASES = [("search", "bfloat16"), ("search", "float32"), ("fine_tuning", "bfloat16"), ("fine_tuning", "float32")]
CASES += [("cache", "bfloat16"), ("cache_emoji", "bfloat16")]
RESOLUTION, PICTURES, BATCH, MICRO, STEPS, BUDGET = 256, 32, 4, 2, 3, 0.66
CACHE_BATCH, CACHE_MICRO = 32, 4  # closer to a real run (256 or more), where the weight update takes little of a step


def pipeline() -> StableDiffusionPipeline:
    """Return Stable Diffusion 2.1 with random weights."""
    torch.manual_seed(0)
    shape, images = load_shape("sd-2.1"), load_emoji(None, 0.0)
    tokenizer = emoji_model.build_tokenizer(images.captions, 2000)
    tokenizer.model_max_length = shape.text_length
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        max_position_embeddings=77,
        hidden_act="gelu",
    )
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=768,
    )
    made = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_config(shape.denoiser.config),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (made.vae, made.text_encoder, made.unet):
        part.eval().requires_grad_(False)
    return made.to("cuda" if torch.cuda.is_available() else "cpu")


def encoded(made: StableDiffusionPipeline, kept: bool, resolution: int = RESOLUTION) -> EncodedData:
    """Encode the first pictures; with `kept`, latents and text states are computed once, else at every step."""
    images = load_emoji(None, 0.0).take(list(range(PICTURES)))
    config = CacheConfig(precision="float16") if kept else CacheConfig(latents="off", text=False)
    return encode(made, images, load_prompt_encoder("emoji"), resolution, config=config)


def training(precision: str, steps: int = STEPS, batch: int = BATCH, micro: int = MICRO) -> dict:
    """Return the settings that search and fine-tuning share."""
    own = {"steps": steps, "batch_size": batch, "micro_batch": micro, "log_every": 1, "precision": precision}
    return {**own, "learning_rate": 1e-5, "gradient_checkpointing": True, "checkpoint_minutes": 1e6}


def step_seconds(rows: list[dict]) -> float:
    """Return the mean seconds of the steps after the first."""
    ends = [row["seconds"] for row in rows if "rate" in row]
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def search(precision: str) -> dict:
    """Time APTP's search with per-sample gates of two experts."""
    made, rows = pipeline(), []
    method = APTP(budget=BUDGET, experts=2, warmup=1, search=training(precision))
    data = encoded(made, kept=True)
    made.vae = made.text_encoder = None
    method.prune(made, data, log=rows.append)
    return {"step_seconds": step_seconds(rows)}


def fine_tuning(precision: str) -> dict:
    """Time the fine-tuning of a UNet sliced to the budget, with the dense one as its teacher."""
    made = pipeline()
    data = encoded(made, kept=True)
    made.vae = made.text_encoder = None
    return {"step_seconds": tune(made, data, sliced(made), training(precision))}


def cache(precision: str) -> dict:
    """Time fine-tuning steps from the cache and with live encoders, one after the other."""
    return with_and_without(pipeline(), RESOLUTION, precision)


def cache_emoji(precision: str) -> dict:
    """Time the same for the embedded model."""
    made = load_pipeline("emoji")
    return with_and_without(made, made.unet.config.sample_size * made.vae_scale_factor, precision, 20 * STEPS)


def with_and_without(
    made: StableDiffusionPipeline, resolution: int, precision: str, steps: int = STEPS
) -> dict[str, float]:
    """Return the seconds of a step with and without the cache, and their ratio."""
    student, seconds = sliced(made), {}
    for kept in (True, False):
        config = training(precision, steps, CACHE_BATCH, CACHE_MICRO)
        seconds[kept] = tune(made, encoded(made, kept, resolution), student, config)
    return {"step_seconds": seconds[True], "without_cache": seconds[False], "ratio": seconds[False] / seconds[True]}


def sliced(made: StableDiffusionPipeline) -> UNet2DConditionModel:
    """Return the UNet sliced to the budget by random scores."""
    space, cost = space_and_cost(made, APTP(budget=BUDGET).config)
    scores = torch.randn(1, space.size, generator=generator(0, "full size"))
    return pk.slice_unet(made.unet, select_mixture(scores, torch.ones(1), cost, BUDGET)[0])


def tune(made: StableDiffusionPipeline, data: EncodedData, student: UNet2DConditionModel, settings: dict) -> float:
    """Return the seconds of a fine-tuning step."""
    rows: list[dict] = []
    with TemporaryDirectory() as folder:  # for the checkpoint after the last step, which no step's time includes
        config = FineTuneConfig(**settings)
        fine_tune(student, made.unet, data, config, Path(folder), scheduler=made.scheduler, log=rows.append)
    return step_seconds(rows)


def peak() -> float:
    """Return the process's peak memory in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Run one case here, or all of them."""
    if len(sys.argv) == 3:
        case = {c.__name__: c for c in (search, fine_tuning, cache, cache_emoji)}[sys.argv[1]]
        print(json.dumps({**case(sys.argv[2]), "peak_gib": round(peak(), 2)}))
        return
    print("| step | precision | seconds | peak memory (GiB) | without cache (s) | ratio |\n|---|---|---|---|---|---|")
    for stage, precision in CASES:
        done = subprocess.run([sys.executable, __file__, stage, precision], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        rest = [f"{row[key]:.3g}" if key in row else "–" for key in ("without_cache", "ratio")]
        print(
            f"| {stage} | {precision} | {row['step_seconds']:.2f} | {row['peak_gib']} | {' | '.join(rest)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
