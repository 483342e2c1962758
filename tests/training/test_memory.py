"""Frozen models are kept in bfloat16 or in host memory."""

import pytest
import torch
from small_data import encoded_for, stub
from small_transformers import build
from unets import build as build_unet
from unets import relative_error

import prunekit as pk
from prunekit.core.call import normal, predict
from prunekit.core.gates import gated
from prunekit.core.registry import denoiser_of
from prunekit.recovery.fine_tuning import FineTuneConfig, fine_tune
from prunekit.runtime.errors import UserError
from prunekit.training.memory import CAST, held, is_lowered, lower, offloaded

TRAINING = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "precision": "bfloat16", "warmup_steps": 0}


def model_of(name):
    """Return a model whose weights of linear layers and convolutions are exact in bfloat16."""
    model = (build_unet("sd2", layers_per_block=1) if name == "unet" else build(name)).requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, CAST):
            for parameter in layer.parameters(recurse=False):
                parameter.copy_(parameter.bfloat16().float())
    return model


def call_of(model):
    return denoiser_of(model).example(model, 2, (8, 8), 5, normal(torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", ["unet", "sd35", "flux"])
def test_a_lowered_model_gives_what_float32_weights_give_under_autocast(name):
    model = model_of(name)
    call = call_of(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = predict(model, call)
    bytes_before = sum(parameter.nbytes for parameter in model.parameters())
    assert lower(lower(model)) is model and is_lowered(model)
    with torch.no_grad():
        assert torch.equal(predict(model, call), expected)
        assert not torch.is_autocast_enabled("cpu")
        cut = lower(pk.slice_unet(model, pk.discover(model).random(0.6, seed=1)))
        with gated(model, pk.discover(model)) as gates:
            gates.set(pk.discover(model).random(0.6, seed=1).values.float().expand(2, -1))
            masked = predict(model, call)
        assert relative_error(predict(cut, call), masked) < 0.02
    assert sum(parameter.nbytes for parameter in model.parameters()) < 0.55 * bytes_before


def test_autocast_ends_where_a_lowered_model_fails():
    model = lower(model_of("unet"))
    with pytest.raises(TypeError):
        model(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["unet", "sd35"])
def test_an_offloaded_model_gives_the_same_and_is_as_before_afterwards(name):
    model = model_of(name)
    call = call_of(model)
    with torch.no_grad():
        expected = predict(model, call)
        with offloaded(model, torch.device("cpu")):
            assert torch.equal(predict(model, call), expected)
        assert torch.equal(predict(model, call), expected)
    assert not any(getattr(part, "_diffusers_hook", None) and part._diffusers_hook.hooks for part in model.modules())


@pytest.mark.parametrize("was", [False, True])
def test_a_training_leaves_recomputation_and_layouts_as_they_were(was):
    model, other = model_of("unet"), model_of("unet")
    if was:
        model.enable_gradient_checkpointing()
        other.to(memory_format=torch.channels_last)
    layouts = [weight.stride() for weight in (*model.parameters(), *other.parameters())]
    config = FineTuneConfig(**TRAINING, gradient_checkpointing=True, channels_last=True)
    with pytest.raises(ZeroDivisionError), held(config, model, other):
        assert model.is_gradient_checkpointing and not other.is_gradient_checkpointing
        for part in (model, other):
            assert part.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        raise ZeroDivisionError
    assert model.is_gradient_checkpointing == was
    assert [weight.stride() for weight in (*model.parameters(), *other.parameters())] == layouts


def test_a_kernel_of_a_video_model_has_no_layout_channels_last():
    model = build("wan")
    with held(FineTuneConfig(**TRAINING, channels_last=True), model):
        assert model.patch_embedding.weight.is_contiguous()


def test_low_rank_changes_of_a_lowered_model_train_beside_an_offloaded_teacher(tmp_path):
    teacher, losses = model_of("sd35"), {}
    data, scheduler = encoded_for(teacher), stub(teacher).scheduler
    for name in ("float32", "bfloat16"):
        config = FineTuneConfig(**TRAINING, lora={"rank": 4})
        student = pk.slice_unet(teacher, pk.discover(teacher).random(0.6, seed=1))
        if name == "bfloat16":
            student, teacher = lower(student), lower(teacher)
        before = {key: value.clone() for key, value in student.state_dict().items()}
        offload = name == "bfloat16"
        figures = fine_tune(
            student, teacher, data, config, tmp_path / name, scheduler=scheduler, offload_teacher=offload
        )
        losses[name] = figures["loss"]
        after = student.state_dict()
        assert after.keys() == before.keys() and all(after[key].dtype == before[key].dtype for key in before)
        assert any(not torch.equal(after[key], before[key]) for key in before)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_all_weights_of_a_lowered_model_are_not_trained(tmp_path):
    teacher = model_of("unet")
    student = lower(pk.slice_unet(teacher, pk.discover(teacher).random(0.6, seed=1)))
    with pytest.raises(UserError, match="can change only by"):
        fine_tune(student, teacher, encoded_for(teacher), FineTuneConfig(**TRAINING), tmp_path, scheduler=None)


def test_a_lowered_model_is_refitted():
    model = lower(model_of("sd35"))
    student = lower(pk.slice_unet(model, pk.discover(model).random(0.6, seed=1)))
    fits = pk.refit(student, stub(model), encoded_for(model), pk.ClosedFormConfig(samples=8, batch_size=4))
    assert fits and all(fit.after <= fit.before for fit in fits)
