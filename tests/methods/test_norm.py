from types import SimpleNamespace

import pytest
import small_transformers
import torch
import torch_pruning as tp
from diffusers import StableDiffusionPipeline
from small_data import encoded_for, stub
from small_pipeline import pipeline_of
from unets import build

from prunekit import CostModel, discover
from prunekit.methods import Norm, Scores, select
from prunekit.methods.unit_weights import owned_weights, sum_per_unit


def small(shape):
    """Return a small UNet for small latents, on which random inputs are cheap."""
    unet = build(shape)
    unet.register_to_config(sample_size=8)
    return unet


@pytest.fixture(scope="module")
def unet():
    return small("sd2")


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
    scores = Norm(order=order, depth="none").score(unet)
    torch.testing.assert_close(scores.values[space.slice(group)].float(), expected, rtol=1e-5, atol=0)


def test_heads_and_feedforward_own_what_a_zeroed_gate_silences(unet):
    """A unit's sum is over the weights that have no effect without the unit; here they are selected one by one."""
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
    """The units of a group own all weights of a layer, and no weight has two owners."""
    unet = build("sdxl", resnet_time_scale_shift=shift)
    for group in discover(unet, "none").groups:
        owned = owned_weights(unet, group)
        count = sum_per_unit(unet, group, lambda weight: torch.ones_like(weight))
        assert count.sum() == sum(item.layer.weight.numel() for item in owned)
        assert (count == count[0]).all()


def test_width_scores_do_not_depend_on_the_scale_of_a_layer(unet):
    before, measured = (Norm(depth=depth, samples=1).score(unet) for depth in ("none", "all"))
    group = group_of(before.space, "feedforward")
    other = small("sd2")
    with torch.no_grad():
        for owned in owned_weights(other, group):
            owned.layer.weight.mul_(7)
    after, measured_after = (Norm(depth=depth, samples=1).score(other) for depth in ("none", "all"))
    torch.testing.assert_close(after.values, before.values)
    layer = next(item for item in measured.space.depth_groups if item.removes(group.path))
    position = measured.space.slice(layer)
    assert measured_after.values[position] > 2 * measured.values[position]


def test_a_small_unit_and_a_small_layer_go_first():
    unet = small("sd1")
    space = discover(unet)
    group, layer = group_of(space, "resnet"), space.depth_groups[3]
    module = unet.get_submodule(layer.path)
    with torch.no_grad():
        unet.get_submodule(group.path).conv1.weight[: group.channels] *= 0.01
        unet.get_submodule(group.path).time_emb_proj.weight[: group.channels] *= 0.01
        unet.get_submodule(group.path).conv2.weight[:, : group.channels] *= 0.01
        for part in module.modules():
            if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
                part.weight *= 1e-4
        module.proj_out.bias.zero_()
    scores = Norm(samples=2).score(unet)
    lowest = set(scores.values.argsort()[:2].tolist())
    assert lowest == {space.slice(group).start, space.slice(layer).start}
    layers = Norm(samples=2, scope="layer").score(unet).values[space.num_width :]
    assert layers.argmin() == 3 and layers.min() == 1 / 14 and layers.max() == 1


def test_depths_are_measured_on_the_data_that_is_given(unet):
    data, pipeline = encoded_for(unet), stub(unet)
    random, given, again, other = (
        Norm(samples=2, seed=seed).score(pipeline, dataset)
        for dataset, seed in ((None, 0), (data, 0), (data, 0), (data, 1))
    )
    depths = slice(given.space.num_width, None)
    assert torch.equal(given.values, again.values)
    assert not torch.allclose(given.values[depths], other.values[depths], rtol=1e-3)
    assert not torch.allclose(given.values[depths], random.values[depths], rtol=1e-3)
    with pytest.raises(ValueError, match=r"samples=9, but there are 8 training pairs"):
        Norm(samples=9).score(pipeline, data)
    with pytest.raises(ValueError, match="UNet alone cannot encode"):
        Norm().score(unet, data.images)
    with pytest.raises(ValueError, match="got list"):
        Norm().score(pipeline, [])


def test_zero_weights_score_zero():
    unet = small("sd1")
    group = discover(unet).groups[0]
    with torch.no_grad():
        for owned in owned_weights(unet, group):
            owned.layer.weight.zero_()
    scores = Norm(samples=1).score(unet)
    assert (scores.values[scores.space.slice(group)] == 0).all()


def test_scope_layer_takes_the_same_share_of_every_layer(unet):
    method = Norm(scope="layer", depth="none", budget=0.5)
    result = method.prune(unet)
    shares = [row["kept"] / row["total"] for row in result.architectures[0].describe() if row["total"] >= 8]
    assert max(shares) - min(shares) <= 1 / 8
    globally = Norm(depth="none", budget=0.5).prune(unet)
    assert globally.architectures[0] != result.architectures[0]


def test_one_score_any_budget(unet):
    scores = Norm(depth="all", samples=1).score(unet)
    cost = CostModel(unet, scores.space)
    ratios = [cost.ratio(select(scores, cost, budget)) for budget in (0.9, 0.7, 0.5)]
    assert ratios == sorted(ratios, reverse=True) and all(r <= b for r, b in zip(ratios, (0.9, 0.7, 0.5), strict=True))


def test_budget_is_met_at_the_resolution_of_the_settings(unet):
    pipeline = pipeline_of(StableDiffusionPipeline, unet)
    scale = pipeline.vae_scale_factor
    result = Norm(resolution=24 * scale, text_length=9, samples=1).prune(pipeline)
    assert result.info.sample_size == (24, 24) and result.info.text_length == 9
    cost = CostModel(unet, result.space, 24, 9)
    assert result.info.macs == [cost.macs(result.architectures[0])] and result.info.ratio[0] <= 0.8
    odd = small("sd2")
    wide = Norm(resolution=(24 * scale, 16 * scale), samples=1).prune(pipeline_of(StableDiffusionPipeline, odd))
    assert wide.info.sample_size == (24, 16)


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
    assert Norm(resolution=64, samples=1).prune(pipeline).info.sample_size == (16, 16)
    with pytest.raises(ValueError, match=r"multiples of the VAE's scale 4; the nearest is \(64, 32\)"):
        Norm(resolution=(63, 33)).prune(pipeline)


def test_directory_holds_scores_and_result(unet, tmp_path):
    result = Norm(samples=1).prune(unet, directory=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "scores.safetensors"]
    scores = Scores.load(tmp_path / "scores.safetensors", result.space)
    cost = CostModel(unet, result.space)
    assert select(scores, cost, 0.8) == result.architectures[0]
    assert scores.info["settings"]["order"] == 2


def test_scores_are_made_once_for_all_budgets(tmp_path, monkeypatch):
    unet, made = small("sd2"), []
    score = Norm.score
    monkeypatch.setattr(Norm, "score", lambda *args: made.append(1) or score(*args))

    def prune(dataset=None, **settings):
        made.clear()
        result = Norm(**{"depth": "none", **settings}).prune(unet, dataset, tmp_path)
        return result, bool(made)

    first, was_made = prune(budget=0.8)
    assert was_made
    second, was_made = prune(budget=0.5)
    assert not was_made and second.architectures == Norm(depth="none", budget=0.5).prune(unet).architectures
    again, was_made = prune(budget=0.8)
    assert not was_made and again.architectures == first.architectures and again.info == first.info
    assert prune(order=1)[1] and prune(encoded_for(unet), order=1)[1] and prune(encoded_for(unet, seed=1), order=1)[1]
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 1
    assert prune(encoded_for(unet, seed=1), order=1)[1] and not prune(encoded_for(unet, seed=1), order=1)[1]


def test_a_depthwise_convolutions_weights_belong_to_its_units():
    """In Sana, a unit owns channels in both halves of two convolutions and in a third one, but no weights of norms."""
    model = small_transformers.build("sana15")
    space = discover(model, "none")
    group = space.group("feedforward:transformer_blocks.0.ff")
    ff, width = model.transformer_blocks[0].ff, group.size * group.channels
    values = sum_per_unit(model, group, lambda weight: weight.detach() ** 2)
    for unit in (0, group.size - 1):
        own = list(range(unit * group.channels, (unit + 1) * group.channels))
        both = own + [width + channel for channel in own]
        rows = (ff.conv_inverted.weight[both], ff.conv_depth.weight[both], ff.conv_point.weight[:, own])
        assert values[unit].item() == pytest.approx(sum(part.square().sum().item() for part in rows), rel=1e-5)
    heads = space.group("attention:transformer_blocks.0.attn1")
    assert len(owned_weights(model, heads)) == 4
