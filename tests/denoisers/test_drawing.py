"""Pipelines with special latents or outputs: their pictures are generated, served, timed and reconstructed."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from small_transformer_pipelines import make

import prunekit as pk
from prunekit.core.registry import call_options, denoiser_in, denoiser_of, scale_of, text_length, texts_of
from prunekit.evaluation.ceiling import reconstruct
from prunekit.evaluation.generate import generate
from prunekit.jobs.bench.workloads import pipeline_call
from prunekit.models import load_pipeline

TEXTS, SEEDS, SIDE, GUIDANCE = ["red apple", "a blue house"], [3, 4], 64, 3.0
LATER = ("flux", "pixart", "flux2_klein_base")
SOON = ("sana15", "wan", "z_image", "cogview4", "flux2")
NAMES = [*SOON, *(pytest.param(name, marks=pytest.mark.long) for name in LATER)]


@pytest.fixture(scope="module", params=NAMES)
def pipeline(request):
    pipeline = make(request.param, load_pipeline("emoji"))[0]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock(pipeline, index):
    """Return a picture of the stock pipeline, (H, W, 3)."""
    generator = torch.Generator().manual_seed(SEEDS[index])
    sizes = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "np"}
    output = pipeline(prompt=TEXTS[index], generator=[generator], **sizes, **call_options(pipeline, GUIDANCE))
    pictures = output.frames[:, 0] if hasattr(output, "frames") else output.images
    return pictures[0]


def test_pictures_are_the_stock_pipelines(pipeline):
    drawn = generate(pipeline, TEXTS, SEEDS, steps=2, guidance=GUIDANCE, batch_size=1, size=SIDE)
    assert drawn.shape == (2, 3, SIDE, SIDE)
    for index, picture in enumerate(drawn):
        expected = torch.from_numpy((stock(pipeline, index) * 255).round().astype(np.uint8)).permute(2, 0, 1)
        assert torch.equal(picture, expected)


@pytest.mark.parametrize(
    "kind", ["np", "pil", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("pt", "latent"))]
)
def test_a_served_picture_is_the_stock_pipelines(kind, pipeline):
    served = pk.PromptRoutedPipeline.from_experts(pipeline, [denoiser_in(pipeline)], guidance=GUIDANCE)
    sizes = {"height": SIDE, "width": SIDE, "num_inference_steps": 2}
    drawn = served(TEXTS, seeds=SEEDS, **sizes, output_type=kind)
    assert len(drawn.images) == 2
    expected = stock(pipeline, 1)
    if kind == "np":
        assert np.array_equal(drawn.images[1], expected)
    elif kind == "pil":
        assert np.array_equal(np.asarray(drawn.images[1]), (expected * 255).round().astype(np.uint8))
    elif kind == "pt":
        assert np.allclose(drawn.images[1].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    model, side = denoiser_in(pipeline), SIDE // scale_of(pipeline)
    cost = pk.CostModel(model, pk.discover(model, "none"), side, text_length(pipeline))
    assert drawn.macs == [cost.dense_macs * 2 * texts_of(pipeline, GUIDANCE)] * 2


@pytest.mark.parametrize("workload", ["sampling", pytest.param("image", marks=pytest.mark.long)])
def test_what_is_timed_is_a_call_of_the_stock_pipeline(workload, pipeline):
    with ExitStack() as stack, torch.no_grad():
        output = pipeline_call(pipeline, workload, SIDE, 2, GUIDANCE, 2, stack)()
    if workload == "image":
        assert output.shape == (2, 3, SIDE, SIDE)
    else:
        assert len(output) == 2 and output.isfinite().all()


def test_pictures_go_through_the_autoencoder(pipeline):
    pictures = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = reconstruct(pipeline.vae, pictures, batch_size=2, family=denoiser_of(denoiser_in(pipeline)).family)
    assert seen.shape == pictures.shape and seen.dtype == torch.uint8
