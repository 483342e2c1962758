"""Taylor-SP equals torch-pruning, follows the paper's rule of timesteps, and gives the same on two processes."""

import pytest
import torch
import torch_pruning as tp
from accelerate import debug_launcher
from safetensors.torch import load_file, save_file
from small_data import encoded_for, stub
from unets import build

from prunekit import discover
from prunekit.core.axes import Axis
from prunekit.core.registry import process_of
from prunekit.methods import Norm, Scores, TaylorSP
from prunekit.methods.calibration import calibration_batches
from prunekit.methods.taylor_sp import gradients_only_of, spaced_timesteps, width_scores
from prunekit.methods.unit_weights import OwnedWeight, owned_weights, sum_per_channel

SMALL = {"samples": 4, "batch_size": 3, "num_timesteps": 3, "depth": "none"}


@pytest.fixture(scope="module")
def unet():
    return build("sd2")


@pytest.mark.parametrize(("aggregation", "multivariable"), [("sum_abs", False), ("abs_sum", True)])
def test_resblock_equals_torch_pruning(unet, aggregation, multivariable):
    space = discover(unet, "none", include="down_blocks.1.resnets.0")
    (group,) = space.groups
    module = unet.get_submodule(group.path)
    x, temb = torch.randn(2, module.in_channels, 4, 4), torch.randn(2, module.time_emb_proj.in_features)
    module.zero_grad()
    module(x, temb).square().mean().backward()
    graph = tp.DependencyGraph().build_dependency(module, example_inputs=(x, temb))
    channels = list(range(module.conv1.out_channels))
    pruning_group = graph.get_pruning_group(module.conv1, tp.prune_conv_out_channels, idxs=channels)
    convolutions = tp.importance.GroupTaylorImportance(
        group_reduction=None, normalizer=None, multivariable=multivariable, target_types=[torch.nn.Conv2d]
    )
    expected = dict(zip(("conv1", "conv2"), convolutions(pruning_group), strict=True))  # (C,) each

    def ours(owned):
        product = owned.layer.weight.detach() * owned.layer.weight.grad
        return sum_per_channel(owned, product).abs() if multivariable else sum_per_channel(owned, product.abs())

    for name, side in (("conv1", "out"), ("conv2", "in")):
        owned = OwnedWeight(getattr(module, name), Axis(name, side))
        torch.testing.assert_close(ours(owned), expected[name], rtol=1e-5, atol=0)
    gradients = {owned.layer.weight: owned.layer.weight.grad for owned in owned_weights(unet, group)}
    summed = tp.importance.GroupTaylorImportance(
        group_reduction="sum",
        normalizer=None,
        multivariable=multivariable,
        target_types=[torch.nn.Conv2d, torch.nn.Linear],
    )
    with torch.no_grad():
        scores = width_scores(unet, space, gradients, aggregation)
    by_unit = summed(pruning_group).view(group.size, group.channels).sum(1)
    torch.testing.assert_close(scores.float(), by_unit, rtol=1e-5, atol=0)
    module.zero_grad(set_to_none=True)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_scores_come_from_the_gradient_of_the_summed_losses(unet, prediction_type):
    pipeline, data = stub(unet, prediction_type), encoded_for(unet)
    scores = TaylorSP(**SMALL).score(pipeline, data)
    process = process_of(pipeline)
    total, losses = 0.0, {}
    for timestep in (0, 333, 666):
        batch = next(iter(calibration_batches(pipeline, data, 4, 4, 0, timestep)))
        prediction = unet(**batch.call).sample
        goal = process.target(batch.latents, batch.noise, batch.timesteps)
        loss = torch.nn.functional.mse_loss(prediction, goal)
        total, losses[str(timestep)] = total + loss, loss.item()
    assert scores.info["losses"] == pytest.approx(losses, rel=1e-5)
    assert scores.info["timesteps"] == [0, 333, 666]
    group = scores.space.groups[0]
    weights = [owned.layer.weight for owned in owned_weights(unet, group)]
    with gradients_only_of(unet, weights):
        gradients = dict(zip(weights, torch.autograd.grad(total, weights), strict=True))
    space = discover(unet, "none", include=group.path)
    with torch.no_grad():
        expected = width_scores(unet, space, gradients, "sum_abs")
    torch.testing.assert_close(scores.values[scores.space.slice(group)], expected, rtol=1e-4, atol=0)


def test_the_sum_ends_where_the_loss_has_fallen(unet, monkeypatch):
    """Losses are like those of a trained noise prediction; the timestep that ends the sum is excluded."""
    falling = {0: 1.0, 250: 0.3, 500: 0.04, 750: 0.9}

    def loss_of(prediction, goal):
        return 0 * prediction.flatten(1).mean(1) + next(values)

    pipeline, data = stub(unet, "epsilon"), encoded_for(unet)
    settings = {**SMALL, "num_timesteps": 4, "batch_size": 4, "include": "mid_block.*"}
    monkeypatch.setattr("prunekit.methods.taylor_sp._check", lambda *args: None)
    monkeypatch.setattr("prunekit.methods.taylor_sp.per_sample_mse", loss_of)
    for threshold, used in ((0.05, [0, 250]), (0.5, [0]), (0.0, [0, 250, 500, 750])):
        values = iter(falling.values())
        scores = TaylorSP(**settings, threshold=threshold).score(pipeline, data)
        assert scores.info["timesteps"] == used
        visited = list(falling)[: len(used) + 1]
        assert scores.info["losses"] == pytest.approx({str(t): falling[t] for t in visited})


def test_a_velocity_loss_does_not_fall_and_keeps_all_timesteps(unet):
    scores = TaylorSP(**{**SMALL, "num_timesteps": 5}).score(stub(unet, "v_prediction"), encoded_for(unet))
    assert scores.info["timesteps"] == [0, 200, 400, 600, 800] == spaced_timesteps(1000, 5)
    assert spaced_timesteps(3, 50) == [0, 1, 2]


def test_the_unet_is_left_as_it_was():
    unet = build("sd1").train()
    unet.conv_in.requires_grad_(False)
    unet.mid_block.eval()
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    flags = [parameter.requires_grad for parameter in unet.parameters()]
    modes = [module.training for module in unet.modules()]
    settings = {**SMALL, "include": "mid_block.*", "depth": "all", "samples": 2}
    scores = TaylorSP(**settings).score(stub(unet), encoded_for(unet))
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in state.items())
    assert flags == [parameter.requires_grad for parameter in unet.parameters()]
    assert modes == [module.training for module in unet.modules()]
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert scores.space.num_depth and (scores.values > 0).all()


def test_batch_size_changes_nothing_and_seeds_and_aggregation_do(unet):
    pipeline, data = stub(unet), encoded_for(unet)
    settings = {**SMALL, "include": "mid_block.*"}
    scores = TaylorSP(**settings).score(pipeline, data).values
    alone = TaylorSP(**{**settings, "batch_size": 1}).score(pipeline, data).values
    torch.testing.assert_close(alone, scores, rtol=1e-4, atol=0)
    for other in ({"seed": 1}, {"aggregation": "abs_sum"}):
        assert not torch.allclose(TaylorSP(**{**settings, **other}).score(pipeline, data).values, scores, rtol=1e-4)
    close = TaylorSP(**settings, precision="bfloat16").score(pipeline, data).values
    torch.testing.assert_close(close, scores, rtol=0.1, atol=0)


def test_what_cannot_be_scored_is_refused(unet):
    pipeline, data = stub(unet), encoded_for(unet)
    with pytest.raises(ValueError, match=r"samples=9, but there are 8 training pairs"):
        TaylorSP(samples=9).score(pipeline, data)
    with pytest.raises(ValueError, match="needs data"):
        TaylorSP().score(pipeline)
    with pytest.raises(ValueError, match="needs the whole pipeline"):
        TaylorSP().score(unet, data)
    zero = build("sd1")
    zero.conv_out.weight.data.zero_()
    with pytest.raises(ValueError, match=r"all Taylor scores are zero .* output layer or its weights are zero"):
        TaylorSP(**SMALL).score(stub(zero), data)
    zero.conv_out.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="loss at timestep 0 is not finite"):
        TaylorSP(**SMALL).score(stub(zero), data)


def test_scores_serve_any_budget(unet, tmp_path, monkeypatch):
    pipeline, data = stub(unet), encoded_for(unet)
    settings = {**SMALL, "include": "mid_block.*"}
    first = TaylorSP(**settings, budget=0.995).prune(pipeline, data, tmp_path)
    assert load_file(tmp_path / "scores.safetensors")
    monkeypatch.setattr(TaylorSP, "_gradients", None)
    second = TaylorSP(**settings, budget=0.99).prune(pipeline, data, tmp_path)
    assert second.info.macs[0] < first.info.macs[0]
    assert Scores.load(tmp_path / "scores.safetensors").info["timesteps"] == [0, 333, 666]
    with pytest.raises(TypeError):  # with another key, it calibrates (and fails)
        TaylorSP(**settings, budget=0.99, threshold=0.1).prune(pipeline, data, tmp_path)


def scores_of_both(unet):
    pipeline, data = stub(unet), encoded_for(unet)
    settings = {"include": "mid_block.*", "depth": "all"}
    taylor = TaylorSP(**{**SMALL, **settings, "samples": 5, "batch_size": 2}).score(pipeline, data)
    norm = Norm(**settings, samples=5).score(pipeline, data)
    losses = torch.tensor(list(taylor.info["losses"].values()), dtype=torch.float64)
    return {"taylor": taylor.values, "norm": norm.values, "losses": losses}


def in_a_process(unet, folder):
    torch.set_num_threads(1)
    values = scores_of_both(unet)
    save_file(values, folder / f"{torch.distributed.get_rank()}.safetensors")


@pytest.mark.long
def test_two_processes_score_as_one(unet, tmp_path, monkeypatch):
    monkeypatch.setattr("prunekit.methods.calibration.ROW_TOKENS", 128)  # makes three batches for the processes
    debug_launcher(in_a_process, (unet, tmp_path), num_processes=2)
    one = scores_of_both(unet)
    for rank in (0, 1):
        values = load_file(tmp_path / f"{rank}.safetensors")
        for name, expected in one.items():
            torch.testing.assert_close(values[name], expected, rtol=1e-5, atol=0)
        assert torch.equal(values["norm"], one["norm"])
