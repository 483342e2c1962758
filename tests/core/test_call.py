"""A Call can be sliced, moved and repeated, and a denoiser with other argument names runs through the same code."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import encoded_for, stub
from small_denoiser import TinyTransformer, registered
from unets import SHAPES, build, inputs, relative_error

from prunekit.core.call import Call, normal, predict, zeros
from prunekit.core.registry import denoiser_in, denoiser_name, denoiser_of, latent_size, process_of, with_denoiser
from prunekit.evaluation.agreement import agreement, data_samples
from prunekit.measuring.clock import timed_inputs
from prunekit.methods import BKSDM
from prunekit.methods.calibration import calibration_batches
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective
from prunekit.runtime.errors import UserError
from prunekit.training.distillation import block_outputs

SETTINGS = {"steps": 1, "batch_size": 4, "learning_rate": 1e-3}


def call_of(batch, nested=True, scalar=False):
    """Return a call whose values identify their sample."""
    rows = torch.arange(batch, dtype=torch.float32)
    arguments = {
        "sample": rows.view(-1, 1, 1, 1).expand(-1, 2, 3, 3) + 0.5,
        "timestep": torch.tensor(7) if scalar else 10 * torch.arange(batch),
    }
    return Call({**arguments, "added": {"sizes": rows.view(-1, 1).repeat(1, 6)}} if nested else arguments)


def same(a, b):
    """Return whether two calls have the same arguments with the same values and dtypes."""
    pairs = list(zip(a.tensors(), b.tensors(), strict=True))
    return a.keys() == b.keys() and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def ragged_call_of(batch, nested=True, scalar=False):
    """Return the call of `call_of` with texts of different lengths."""
    texts = [torch.full((1 + index % 3, 2), float(index)) for index in range(batch)]
    return Call({**call_of(batch, nested, scalar), "texts": texts})


calls = st.builds(
    lambda make, *given: make(*given),
    st.sampled_from([call_of, ragged_call_of]),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
rows = st.lists(st.integers(0, 20), min_size=1, max_size=8)


@quick
@given(calls, rows, rows)
def test_taking_composes(call, first, second):
    first = torch.tensor(first) % call.batch
    second = torch.tensor(second) % len(first)
    taken = call.take(first)
    assert taken.batch == len(first) and same(taken.take(second), call.take(first[second]))
    assert same(call.take(torch.arange(call.batch)), call) and same(call.take(slice(None)), call)
    mask = torch.zeros(call.batch, dtype=torch.bool)
    mask[first] = True
    assert same(call.take(mask), call.take(mask.nonzero().flatten()))


@quick
@given(calls, st.integers(1, 4))
def test_repeating_is_joining_and_taking(call, times):
    repeated = call.repeat(times)
    assert repeated.batch == call.batch * times and same(repeated, Call.cat([call] * times))
    assert same(repeated, call.take(torch.arange(call.batch).repeat(times)))
    halves = [call.take(slice(0, 1)), call.take(slice(1, None))] if call.batch > 1 else [call]
    assert same(Call.cat(halves), call)


@quick
@given(calls, st.sampled_from([torch.bfloat16, torch.float16, torch.float64]), st.integers(0, 5))
def test_moving_keeps_integers_and_commutes_with_taking(call, dtype, row):
    moved, rows = call.to("cpu", dtype), torch.tensor([row % call.batch])
    for before, after in zip(call.tensors(), moved.tensors(), strict=True):
        assert after.dtype == (dtype if before.is_floating_point() else before.dtype)
    assert same(moved.take(rows), call.take(rows).to("cpu", dtype)) and same(moved.to("cpu"), moved)
    assert same(moved, call.to(torch.empty(0, dtype=dtype))) and moved.to("meta").device.type == "meta"


def test_a_call_is_a_mapping_that_does_not_change():
    added = {"sizes": torch.zeros(2, 6)}
    call = Call({"sample": torch.zeros(2, 1), "added": added})
    added["sizes"] = torch.ones(2, 6)
    assert not call["added"]["sizes"].any() and dict(call).keys() == {"sample", "added"} and len(call) == 2
    other = call.replace(sample=torch.ones(2, 1))
    assert other["sample"].all() and not call["sample"].any()
    with pytest.raises(KeyError, match="no noise; it has sample, added"):
        call.replace(noise=torch.zeros(2))
    with pytest.raises(TypeError):
        call["sample"] = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="2 and 3 rows"):
        Call({"sample": torch.zeros(2, 1), "timestep": torch.zeros(3)})
    with pytest.raises(ValueError, match="another call has a different value"):
        Call.cat([call_of(1, scalar=True), call_of(1, scalar=True).replace(timestep=torch.tensor(8))])
    assert "(2, 1) torch.float32" in repr(call)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_unets_call_is_what_it_takes(shape):
    unet = build(shape)
    denoiser, arguments = denoiser_of(unet), inputs(unet, 3)
    conditions = {"text": arguments["encoder_hidden_states"]}
    if "added_cond_kwargs" in arguments:
        added = arguments["added_cond_kwargs"]
        conditions |= {"pooled": added["text_embeds"], "sizes": added["time_ids"]}
    call = denoiser.call(arguments["sample"], arguments["timestep"], conditions)
    assert same(call, Call(arguments)) and call.batch == 3
    with torch.no_grad():
        whole = predict(unet, call)
        assert torch.equal(whole, unet(**arguments).sample) and torch.equal(whole, unet(**call).sample)
        assert relative_error(predict(unet, call.take(torch.tensor([2, 0]))), whole[[2, 0]]) < 1e-5
    assert denoiser.noisy(call) is call["sample"] and denoiser.text_length(call) == 7
    other = denoiser.at(call, -call["sample"], call["timestep"] + 1)
    assert (
        torch.equal(other["sample"], -call["sample"])
        and other["encoder_hidden_states"] is call["encoder_hidden_states"]
    )
    example = denoiser.example(unet, 3, (16, 16), 7, zeros())
    shapes = [[tuple(tensor.shape) for tensor in own.tensors() if tensor.dim() > 1] for own in (example, call)]
    assert shapes[0] == shapes[1] and example["timestep"].dim() == 0


@pytest.mark.parametrize("shape", ["sd2", "sdxl"])
def test_examples_of_a_seed_are_the_same(shape):
    unet = build(shape)
    first, again, other = (timed_inputs(unet, 2, 8, 5, seed=seed) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)
    draw = normal(torch.Generator().manual_seed(1))
    assert torch.equal(first["sample"], draw("noisy", (2, 4, 8, 8)))
    assert timed_inputs(unet.to(torch.bfloat16), 2, 8, 5)["sample"].dtype is torch.bfloat16


def test_a_denoiser_of_other_names_runs_through_the_same_code():
    """Calibration, agreement, distillation and a fine-tuning step do not depend on a model's argument names."""
    with registered():
        torch.manual_seed(0)
        model, student = TinyTransformer(), TinyTransformer()
        pipeline = SimpleNamespace(transformer=model, scheduler=DDIMScheduler(prediction_type="v_prediction"))
        assert denoiser_name(pipeline) == "transformer" and denoiser_in(pipeline) is model
        assert with_denoiser(pipeline, student).transformer is student and pipeline.transformer is model
        assert latent_size(model) == (4, 4)
        (batch,) = calibration_batches(pipeline, None, 3, 3, seed=0)
        assert batch.call["hidden_states"].shape == (3, 4, 4, 4) and batch.call["context"].shape == (3, 77, 6)
        text = {"text": torch.randn(8, 5, 6), "null_text": torch.zeros(5, 6)}
        data = replace(encoded_for(build("sd2"), side=4), latents=torch.randn(8, 4, 4, 4), **text)
        samples = data_samples(data, pipeline, count=6)
        assert agreement(model, model, samples) == 0 < agreement(model, student, samples)
        parts = (student, model, process_of(pipeline), data, data.training_pairs())
        objective = FineTuningObjective(*parts, FineTuneConfig(**SETTINGS), 0, torch.device("cpu"))
        with block_outputs(student) as outputs:
            terms = objective.micro_loss(objective.batch(0), torch.arange(4))
        assert list(outputs) == ["layers.0", "layers.1"] and terms["distillation"] > 0
        sum(terms.values()).backward()
        assert all(parameter.grad is not None for parameter in student.parameters())


def test_bksdm_refuses_a_denoiser_without_levels():
    from prunekit.methods.bksdm import _levels

    with registered(), pytest.raises(UserError, match="levels of a UNet, and TinyTransformer has none"):
        _levels(TinyTransformer())
    assert len(BKSDM().members(stub(build("sd2", "meta")))) > 3


def test_an_unknown_model_names_those_that_are_supported():
    for wrong in (torch.nn.Linear(1, 1), SimpleNamespace(unet=None), "x"):
        with pytest.raises(UserError, match="UNet2DConditionModel"):
            denoiser_in(wrong)
    unet = build("sd2", "meta")
    unet.register_to_config(sample_size=None)
    with pytest.raises(UserError, match="no sample_size"):
        latent_size(unet)
