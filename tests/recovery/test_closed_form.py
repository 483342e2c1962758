"""Closed-form recovery of a sliced UNet: no layer's error increases, and the prediction improves."""

import copy

import pytest
import torch
from small_data import encoded_for, stub
from unets import build

from prunekit.core.slicing import slice_model
from prunekit.core.space import Architecture
from prunekit.evaluation.agreement import agreement, data_samples
from prunekit.methods import Norm, Random
from prunekit.recovery.closed_form import ClosedFormConfig, consumers, refit

CONFIG = ClosedFormConfig(samples=8, batch_size=2, layers_at_once=4)


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    unet = build("sd2").eval().requires_grad_(False)
    data = encoded_for(unet, num=24)
    architecture = Random(budget=0.6, depth="none").prune(unet).architectures[0]
    return unet, data, architecture


def test_no_layer_gets_worse_and_the_prediction_gets_better(world):
    unet, data, architecture = world
    student, pipeline = slice_model(unet, architecture), stub(unet)
    before = {name: own.clone() for name, own in unet.state_dict().items()}
    samples = data_samples(data, pipeline, seed=7, count=24)
    cut = agreement(unet, student, samples)
    fits = refit(student, pipeline, data, CONFIG)
    assert len(fits) == len(consumers(student, unet)) > 5
    assert all(fit.after <= fit.before * (1 + 1e-9) for fit in fits) and any(fit.ridge is not None for fit in fits)
    assert agreement(unet, student, samples) < 0.9 * cut
    assert all(torch.equal(before[name], own) for name, own in unet.state_dict().items())


def test_a_model_that_keeps_everything_has_nothing_to_refit(world):
    unet, data, architecture = world
    whole = slice_model(unet, Architecture(architecture.space, torch.ones(architecture.space.size, dtype=torch.bool)))
    assert consumers(whole, unet) == [] and refit(whole, stub(unet), data, CONFIG) == []


@pytest.mark.long
def test_larger_batches_give_the_same_fit(world):
    unet, data, architecture = world
    students = [slice_model(unet, architecture) for _ in range(2)]
    for student, size in zip(students, (2, 4), strict=True):
        refit(student, stub(unet), data, CONFIG.model_copy(update={"batch_size": size, "ridges": [1e-2]}))
    # The batch size changes the samples that choose the ridge, but there is only one ridge.
    for (name, ours), theirs in zip(students[0].named_parameters(), students[1].parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=5e-3, atol=5e-3), name


@pytest.mark.long
@pytest.mark.parametrize("changes", [{"inputs": "dense"}, {"timestep_weights": "noise"}, {"ridges": [1e12]}])
def test_the_options(changes, world):
    unet, data, architecture = world
    student = slice_model(unet, architecture)
    cut = copy.deepcopy(student)
    fits = refit(student, stub(unet), data, CONFIG.model_copy(update=changes))
    assert all(fit.after <= fit.before * (1 + 1e-9) for fit in fits)
    if "ridges" in changes:  # a huge ridge gives the uncompensated model
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(student.parameters(), cut.parameters(), strict=True))


@pytest.mark.long
def test_scores_methods_too(world):
    unet, data, _ = world
    architecture = Norm(budget=0.7).prune(unet).architectures[0]
    student = slice_model(unet, architecture)
    assert refit(student, stub(unet), data, CONFIG)
