from types import SimpleNamespace

import pytest
import torch
import torch_pruning as tp
from diffusers import StableDiffusionPipeline
from small_pipeline import pipeline_of
from unets import build

from prunekit import CostModel, discover
from prunekit.methods import Norm, Scores, select
from prunekit.methods.weights import covered_weights, owned_weights, sum_per_unit


@pytest.fixture(scope="module")
def unet():
    return build("sd2")


def group_of(space, kind, part=""):
    return next(group for group in space.groups if group.kind == kind and part in group.path)


@pytest.mark.parametrize("order", [1, 2])
def test_resblock_equals_torch_pruning(unet, order):
    space = discover(unet)
    group = group_of(space, "resnet", "down_blocks.1.resnets.0")
    module = unet.get_submodule(group.path)
    x, temb = torch.randn(1, module.in_channels, 4, 4), torch.randn(1, module.time_emb_proj.in_features)
    graph = tp.DependencyGraph().build_dependency(module, example_inputs=(x, temb))
    channels = list(range(module.conv1.out_channels))
    pruning_group = graph.get_pruning_group(module.conv1, tp.prune_conv_out_channels, idxs=channels)
    per_channel = tp.importance.MagnitudeImportance(p=order)(pruning_group)
    expected = per_channel.view(group.size, group.channels).mean(1)
    scores = Norm(order=order).score(unet)
    torch.testing.assert_close(scores.values[space.slice(group)].float(), expected, rtol=1e-5, atol=0)


def test_heads_and_feedforward_own_what_a_zeroed_gate_silences(unet):
    """A unit's sum is that of the weights that become useless without it, counted one by one."""
    space = discover(unet)
    for kind, part in (("attention", "attn1"), ("attention", "attn2"), ("feedforward", "")):
        group = group_of(space, kind, part)
        module = unet.get_submodule(group.path)
        rows = slice(group.channels, 2 * group.channels)  # unit 1
        if kind == "attention":
            parts = [module.to_q.weight[rows], module.to_k.weight[rows], module.to_v.weight[rows]]
            parts.append(module.to_out[0].weight[:, rows])
        else:
            values, gates = module.net[0].proj.weight.chunk(2)
            parts = [values[rows], gates[rows], module.net[2].weight[:, rows]]
        expected = sum(part.double().square().sum() for part in parts)
        total = sum_per_unit(unet, group, lambda weight: weight.detach().double() ** 2)
        torch.testing.assert_close(total[1], expected.detach())


@pytest.mark.parametrize("shift", ["default", "scale_shift"])
def test_owned_weights_are_those_that_slicing_removes(shift):
    """The units of a group own a layer's weights completely, and together with no overlap."""
    unet = build("sdxl", resnet_time_scale_shift=shift)
    for group in discover(unet, "none").groups:
        owned = owned_weights(unet, group)
        count = sum_per_unit(unet, group, lambda weight: torch.ones_like(weight))
        assert count.sum() == sum(item.layer.weight.numel() for item in owned)
        assert (count == count[0]).all()


def test_scores_do_not_depend_on_the_scale_of_a_layer(unet):
    before = Norm(depth="all").score(unet)
    group = group_of(before.space, "feedforward")
    other = build("sd2")
    with torch.no_grad():
        for owned in owned_weights(other, group):
            owned.layer.weight.mul_(7)
    after = Norm(depth="all").score(other)
    torch.testing.assert_close(after.values[: before.space.num_width], before.values[: before.space.num_width])
    layer = next(item for item in before.space.depth_groups if item.removes(group.path))
    assert after.values[before.space.slice(layer)] > before.values[before.space.slice(layer)]


def test_a_small_unit_and_a_small_layer_go_first():
    unet = build("sd1")
    space = discover(unet)
    group, layer = group_of(space, "resnet"), space.depth_groups[3]
    with torch.no_grad():
        unet.get_submodule(group.path).conv1.weight[: group.channels] *= 0.01
        unet.get_submodule(group.path).time_emb_proj.weight[: group.channels] *= 0.01
        unet.get_submodule(group.path).conv2.weight[:, : group.channels] *= 0.01
        for weight in covered_weights(unet, layer):
            weight *= 0.01
    scores = Norm().score(unet)
    lowest = set(scores.values.argsort()[:2].tolist())
    assert lowest == {space.slice(group).start, space.slice(layer).start}


def test_zero_weights_score_zero():
    unet = build("sd1")
    group = discover(unet).groups[0]
    with torch.no_grad():
        for owned in owned_weights(unet, group):
            owned.layer.weight.zero_()
    scores = Norm().score(unet)
    assert (scores.values[scores.space.slice(group)] == 0).all()


def test_scope_layer_takes_the_same_share_of_every_layer(unet):
    method = Norm(scope="layer", depth="none", budget=0.5)
    result = method.prune(unet)
    shares = [row["kept"] / row["total"] for row in result.architectures[0].describe() if row["total"] >= 8]
    assert max(shares) - min(shares) <= 1 / 8
    globally = Norm(depth="none", budget=0.5).prune(unet)
    assert globally.architectures[0] != result.architectures[0]


def test_one_score_any_budget(unet):
    scores = Norm(depth="all").score(unet)
    cost = CostModel(unet, scores.space)
    ratios = [cost.ratio(select(scores, cost, budget)) for budget in (0.9, 0.7, 0.5)]
    assert ratios == sorted(ratios, reverse=True) and all(r <= b for r, b in zip(ratios, (0.9, 0.7, 0.5), strict=True))


def test_budget_is_met_at_the_resolution_of_the_settings(unet):
    pipeline = pipeline_of(StableDiffusionPipeline, unet)
    scale = pipeline.vae_scale_factor
    result = Norm(resolution=24 * scale, text_length=9).prune(pipeline)
    assert result.info["sample_size"] == [24, 24] and result.info["text_length"] == 9
    cost = CostModel(unet, result.space, 24, 9)
    assert result.info["macs"] == [cost.macs(result.architectures[0])] and result.info["ratio"][0] <= 0.8
    odd = build("sd2")
    assert Norm(resolution=(24 * scale, 16 * scale)).prune(pipeline_of(StableDiffusionPipeline, odd)).info[
        "sample_size"
    ] == [24, 16]


def test_settings_are_refused_by_name(unet):
    with pytest.raises(ValueError, match=r"unknown setting 'budgt'; did you mean 'budget'\?"):
        Norm(budgt=0.5)
    for settings in ({"budget": 1.0}, {"budget": 0}, {"order": 3}, {"scope": "block"}, {"depth": "some"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Norm(**settings)
    with pytest.raises(ValueError, match="pass the whole pipeline"):
        Norm(resolution=128).prune(unet)
    with pytest.raises(ValueError, match="got int"):
        Norm().score(3)
    with pytest.raises(ValueError, match="meta device"):
        Norm().score(build("sd1", device="meta"))


def test_resolution_is_a_multiple_of_the_vae_scale(unet):
    autoencoder_scale = 4
    pipeline = SimpleNamespace(unet=unet, vae_scale_factor=autoencoder_scale)
    assert Norm(resolution=64).prune(pipeline).info["sample_size"] == [16, 16]
    with pytest.raises(ValueError, match=r"multiples of the VAE's scale 4; the nearest is \(64, 32\)"):
        Norm(resolution=(63, 33)).prune(pipeline)


def test_directory_holds_scores_and_result(unet, tmp_path):
    result = Norm().prune(unet, directory=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "scores.safetensors"]
    scores = Scores.load(tmp_path / "scores.safetensors", result.space)
    cost = CostModel(unet, result.space)
    assert select(scores, cost, 0.8) == result.architectures[0]
    assert scores.info["settings"]["order"] == 2
