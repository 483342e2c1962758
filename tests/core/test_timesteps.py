"""A model of slices, one per bin of timesteps: each sample runs through its slice, also in a stock pipeline."""

from fractions import Fraction

import pytest
import small_transformers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pipeline import pipeline_of
from unets import MORE_SHAPES, build, inputs

from prunekit.core.call import Call, predict
from prunekit.core.discovery import discover
from prunekit.core.registry import denoiser_in, denoiser_of, is_denoiser
from prunekit.core.slicing import slice_model
from prunekit.core.timesteps import TimestepBins, TimestepModel, read_denoiser, sampled_timesteps
from prunekit.methods import Random
from prunekit.methods.timestep_experts import even_bins
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


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image"])
def test_the_denoisers_unit_changes_no_bin(name):
    """Some models take t/1000 or 1 - t/1000; the bin of a timestep is the same as in the scheduler's unit."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(30)
    times, denoiser = scheduler.timesteps, denoiser_of(small_transformers.CONFIGS[name][0])
    bins = even_bins(times.double(), 4)
    for dtype in (torch.float32, torch.float64):
        given = times.to(dtype)
        assert torch.equal(bins.of_taken(denoiser.taken(given), denoiser.taken), bins.of(times))


@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_each_sample_of_a_transformer_runs_through_its_own_slice(name):
    dense = small_transformers.build(name)
    slices = [slice_model(dense, discover(dense).random(0.6, seed)) for seed in range(3)]
    model, denoiser = TimestepModel(slices, BINS), denoiser_of(dense)
    call = small_transformers.call_of(dense, 3)
    times = torch.tensor([900.0, 10.0, 300.0])
    with torch.no_grad():
        for rows in ([0], [1], [2], [0, 1, 2]):
            if len(rows) > 1 and call.shared:  # positions of packed latents, which are not per sample
                continue
            part = denoiser.at(call.take(torch.tensor(rows)), denoiser.noisy(call)[rows], times[rows])
            whole = predict(model, part)
            for place, row in enumerate(rows):
                alone = predict(slices[(2, 0, 1)[row]], part.take(slice(place, place + 1)))
                torch.testing.assert_close(whole[place : place + 1], alone, rtol=1e-5, atol=1e-5)


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
