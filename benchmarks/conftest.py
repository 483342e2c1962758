"""Models and data of the benchmarks: Stable Diffusion 2.1's shape, and the embedded model."""

import pytest
import torch

import prunekit as pk
from prunekit.data.encoded import EncodedData
from prunekit.data.images import CaptionedImages
from prunekit.jobs.bench.bench_models import random_unet
from prunekit.models import load_pipeline, load_unet_on_meta
from prunekit.runtime.randomness import generator


@pytest.fixture(scope="session")
def shape():
    """Return Stable Diffusion 2.1's UNet on the meta device."""
    return load_unet_on_meta("sd-2.1")


@pytest.fixture(scope="session")
def space(shape):
    return pk.discover(shape)


@pytest.fixture(scope="session")
def unet():
    """Return Stable Diffusion 2.1's UNet with random weights in float32."""
    return random_unet("sd-2.1", torch.device("cpu"), torch.float32, 0)


@pytest.fixture(scope="session")
def pipeline():
    """Return the embedded pipeline."""
    return load_pipeline("emoji")


@pytest.fixture(scope="session")
def data(pipeline):
    """Return random latents, texts and prompts with the shapes that the embedded model takes."""
    draw, config, num = generator(0, "benchmark"), pipeline.unet.config, 64
    captions = [f"picture {index}" for index in range(num)]
    rows, is_holdout = torch.arange(num), torch.zeros(num, dtype=torch.bool)
    return EncodedData(
        latents=torch.randn(num, config.in_channels, 8, 8, generator=draw),
        text=torch.randn(num, 16, config.cross_attention_dim, generator=draw),
        null_text=torch.zeros(16, config.cross_attention_dim),
        prompts=torch.nn.functional.normalize(torch.randn(num, 128, generator=draw), dim=1),
        images=CaptionedImages([b""] * num, captions, captions, rows, is_holdout),
    )
