"""Every method on every transformer: it meets the budget, masked equals sliced, and the pruned model is recovered."""

import pytest
import torch
from small_data import encoded_for, stub
from small_methods import SMALL, weights_of
from small_transformers import CONFIGS, build
from unets import relative_error

import prunekit as pk
from prunekit.core.call import normal, predict
from prunekit.core.gates import gated
from prunekit.core.registry import denoiser_of, text_length
from prunekit.methods import get, names
from prunekit.runtime.errors import UserError

BUDGET, STEPS = 0.66, 2
TRAINING = {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-4, "precision": "float32"}
FEWER = ["sd35", *(pytest.param(name, marks=pytest.mark.long) for name in CONFIGS if name != "sd35")]
REFUSING = ("bksdm",)


@pytest.fixture(scope="module", params=FEWER)
def world(request):
    """Return a dense transformer, a stub of its pipeline, and data."""
    model = build(request.param)
    return model, stub(model), encoded_for(model)


def prune(name, world, **settings):
    _, pipeline, data = world
    method = get(name)(**{**SMALL.get(name, {}), "depth": "all", "budget": BUDGET, "resolution": 64, **settings})
    return method.prune(pipeline, data)


@pytest.mark.parametrize("name", [name for name in names() if name not in REFUSING])
def test_budget_is_met_and_masked_is_sliced(name, world):
    model, pipeline, data = world
    result = prune(name, world)
    cost = pk.CostModel(model, result.space, (8, 8), text_length(pipeline))
    ratios = torch.tensor([cost.ratio(a) for a in result.architectures], dtype=torch.float64)
    assert BUDGET - 0.2 < (weights_of(result) * ratios).sum() <= BUDGET
    call = denoiser_of(model).example(model, 2, (8, 8), 5, normal(torch.Generator().manual_seed(0)))
    for architecture in result.architectures:
        cut = pk.slice_unet(model, architecture)
        with torch.no_grad(), gated(model, architecture.space) as gates:
            gates.set(architecture.values.float().expand(2, -1))
            masked = predict(model, call)
        with torch.no_grad():
            assert relative_error(predict(cut, call), masked) <= 1e-5
    if result.router is not None:
        assert result.router.route(data.prompts[:]).max() < result.num_experts


@pytest.mark.parametrize("name", REFUSING)
def test_what_is_made_for_unets_says_so(name, world):
    with pytest.raises(UserError, match="UNet") as error:
        prune(name, world)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("more", [{}, {"lora": {"rank": 2}}, {"feature_scale": "mean"}], ids=str)
def test_a_cut_transformer_is_fine_tuned(more, world, tmp_path):
    model, pipeline, data = world
    (architecture,) = prune("norm", world).architectures
    student = pk.slice_unet(model, architecture)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    config = pk.FineTuneConfig(**TRAINING, warmup_steps=0, **more)
    figures = pk.fine_tune(student, model, data, config, tmp_path, scheduler=pipeline.scheduler)
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values())
    assert any(not torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_a_cut_transformer_is_refitted(world):
    model, pipeline, data = world
    (architecture,) = prune("norm", world).architectures
    student = pk.slice_unet(model, architecture)
    fits = pk.refit(student, pipeline, data, pk.ClosedFormConfig(samples=8, batch_size=4))
    assert fits and all(fit.after <= fit.before for fit in fits)


@pytest.mark.parametrize("name", ["aptp", "one_mask"])
def test_experts_are_recovered_and_routed(name, world):
    model, pipeline, data = world
    result = prune(name, world)
    config = pk.FineTuneConfig(**TRAINING, warmup_steps=0, shared_backbone=True)
    experts = pk.recover_experts(result, pipeline, data, config)
    assert len(experts) == result.num_experts
    call = denoiser_of(model).example(model, 2, (8, 8), 5, normal(torch.Generator().manual_seed(0)))
    with torch.no_grad():
        assert all(predict(expert, call).isfinite().all() for expert in experts)
