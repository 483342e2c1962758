"""A model of slices, one for each bin of timesteps: each sample runs through its own, in a stock pipeline too."""

from fractions import Fraction

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pipeline import pipeline_of
from unets import MORE_SHAPES, build, inputs

from prunekit.core.call import Call, predict
from prunekit.core.registry import denoiser_in, denoiser_of, is_denoiser
from prunekit.core.slicing import slice_model
from prunekit.core.timesteps import TimestepBins, TimestepModel, read_denoiser, sampled_timesteps
from prunekit.methods import Random
from prunekit.runtime.errors import UserError

BINS = TimestepBins((300.0, 600.0))


def model_of(shape, budgets=(0.6, 0.7, 0.8)):
    dense = build(shape).eval().requires_grad_(False)
    slices = [slice_model(dense, Random(budget=b, depth="all").prune(dense).architectures[0]) for b in budgets]
    return dense, TimestepModel(slices, BINS)


@given(bounds=st.lists(st.integers(1, 999), unique=True, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_every_timestep_has_one_bin_and_the_shares_are_exact(bounds, seed):
    bins = TimestepBins(tuple(sorted(bounds)))
    timesteps = torch.randint(1000, (30,), generator=torch.Generator().manual_seed(seed))
    edges = [-1, *bins.bounds, 1001]
    expected = [next(b for b in range(len(bins)) if edges[b] <= t < edges[b + 1]) for t in timesteps.tolist()]
    assert bins.of(timesteps).tolist() == expected
    shares = bins.shares(timesteps.tolist())
    assert sum(shares) == 1 and shares == [Fraction(expected.count(b), 30) for b in range(len(bins))]


def test_bounds_ascend():
    for bounds in ((5.0, 5.0), (6.0, 5.0)):
        with pytest.raises(UserError, match="ascend"):
            TimestepBins(bounds)


@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_each_sample_runs_through_the_slice_of_its_timestep(shape):
    _, model = model_of(shape)
    call = Call({**inputs(model.slices[0], 4, 8), "timestep": torch.tensor([900, 10, 300, 599])})
    with torch.no_grad():
        whole = predict(model, call)
        for row, slot in enumerate((2, 0, 1, 1)):
            alone = predict(model.slices[slot], call.take(slice(row, row + 1)))
            torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-5, atol=1e-6)
        shared = call.replace(timestep=torch.tensor(700))
        assert torch.equal(predict(model, shared), predict(model.slices[2], shared))
        assert torch.equal(model(**shared).sample, model.slices[2](**shared).sample)


def test_a_stock_pipeline_draws_with_it_as_with_its_slices_in_turn():
    dense, model = model_of("sd2")
    pipeline = pipeline_of(StableDiffusionPipeline, dense)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    texts = torch.randn(2, 1, 7, dense.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 6, "output_type": "np", "guidance_scale": 2.0}
    options |= {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    pipeline.unet = model
    drawn = pipeline(generator=torch.Generator().manual_seed(0), **options).images

    def swap(pipe, step, timestep, tensors):
        following = pipe.scheduler.timesteps[min(step + 1, len(pipe.scheduler.timesteps) - 1)]
        pipe.unet = model.slices[int(BINS.of(following))]
        return tensors

    pipeline.unet = model.slices[int(BINS.of(sampled_timesteps(pipeline.scheduler, 6)[0]))]
    swapped = pipeline(generator=torch.Generator().manual_seed(0), callback_on_step_end=swap, **options).images
    assert (drawn == swapped).all()
    assert len({int(b) for b in BINS.of(sampled_timesteps(pipeline.scheduler, 6))}) == 3


def test_it_is_described_by_its_slices_and_holds_no_weights_of_its_own():
    _, model = model_of("sd2")
    assert is_denoiser(model) and denoiser_of(model) is denoiser_of(model.slices[0]) and denoiser_in(model) is model
    assert model.config.in_channels == model.slices[0].config.in_channels and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for s in model.slices for p in s.parameters())


def test_saved_and_loaded_it_gives_the_same(tmp_path):
    _, model = model_of("sd2")
    model.save_pretrained(tmp_path)
    again = read_denoiser(tmp_path).eval()
    assert again.bins == BINS
    call = Call({**inputs(model.slices[0], 3, 8), "timestep": torch.tensor([900, 10, 400])})
    with torch.no_grad():
        assert torch.equal(predict(model, call), predict(again, call))
    (tmp_path / "config.json").write_text('{"_class_name": "TimestepModel", "format": 9, "bounds": [1]}')
    with pytest.raises(UserError, match="format 9"):
        read_denoiser(tmp_path)


def test_another_number_of_slices_is_refused():
    _, model = model_of("sd2")
    with pytest.raises(UserError, match="2 slices for 3 bins"):
        TimestepModel(list(model.slices)[:2], BINS)
