"""Depth units are scored by the output's change without them, and width scores are brought to the same scale."""

import pytest
import torch
from small_data import encoded_for, stub
from unets import SHAPES, build

from prunekit import discover
from prunekit.core.call import Call
from prunekit.core.gates import gated
from prunekit.core.space import Architecture
from prunekit.methods import Depth
from prunekit.methods.calibration import calibration_batches, num_probes
from prunekit.methods.depth_scores import joint_scores, output_changes, width_scale
from prunekit.runtime.errors import UserError
from prunekit.slicing import slice_unet


@pytest.fixture(scope="module")
def unet():
    return build("sd1")


def without(space, group):
    values = torch.ones(space.size, dtype=torch.bool)
    values[space.slice(group)] = False
    return Architecture(space, values)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_is_that_of_the_sliced_unet(shape):
    unet = build(shape)
    pipeline, data, space = stub(unet), encoded_for(unet), discover(unet, "blocks")
    groups = [space.width_groups[0], space.width_groups[-1], *space.depth_groups[:2], space.depth_groups[-1]]
    changes = output_changes(pipeline, space, groups, data, 3, seed=0)
    (batch,) = calibration_batches(pipeline, data, 3, 3, seed=0)
    with torch.no_grad():
        dense = unet(**batch.call).sample
        for group, change in zip(groups, changes, strict=True):
            sliced = slice_unet(unet, without(space, group))
            output = sliced(**batch.call).sample
            assert change > 0
            assert change.item() == pytest.approx((output - dense).square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("with_data", [True, False])
def test_chunks_and_batches_change_nothing(unet, with_data, monkeypatch):
    pipeline, space = stub(unet), discover(unet)
    data = encoded_for(unet) if with_data else None
    groups = space.depth_groups[:3]
    together = output_changes(pipeline, space, groups, data, 4, seed=0)
    monkeypatch.setattr("prunekit.methods.calibration.ROW_TOKENS", 2 * (64 if with_data else 256))  # 2 rows per call
    assert num_probes(pipeline, data) == 2
    torch.testing.assert_close(output_changes(pipeline, space, groups, data, 4, seed=0), together, rtol=1e-4, atol=0)


def test_widths_keep_their_ranking_and_get_the_scale_of_the_changes(unet):
    pipeline, data = stub(unet), encoded_for(unet)
    space = discover(unet, include="down_blocks.*")
    widths = torch.rand(space.num_width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    joint = joint_scores(widths, pipeline, space, data, 1, seed=0)
    large = joint_scores(1e6 * widths, pipeline, space, data, 1, seed=0)
    torch.testing.assert_close(joint, large)
    factor = joint[: space.num_width] / widths
    torch.testing.assert_close(factor, factor[:1].expand_as(factor))
    changes = output_changes(pipeline, space, space.groups, data, 1, seed=0)
    assert torch.equal(joint[space.num_width :], changes[len(space.width_groups) :])
    sums = torch.stack([joint[space.slice(group)].sum() for group in space.width_groups])
    assert (changes[: len(sums)] / sums).median() == pytest.approx(1)
    without_depth = discover(unet, "none", include="down_blocks.*")
    assert torch.equal(joint_scores(widths, pipeline, without_depth, data, 99, seed=0), widths)


def test_groups_without_scores_or_change_do_not_set_the_scale(unet):
    space = discover(unet, include="mid_block.*")
    widths, changes = torch.ones(space.num_width), torch.ones(len(space.width_groups))
    changes[0], widths[space.slice(space.width_groups[1])] = 0, 0
    expected = torch.tensor([1 / group.size for group in space.width_groups[2:]]).median()
    assert width_scale(widths, changes, space) == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="cannot be compared"):
        width_scale(widths, 0 * changes, space)


def test_the_unet_is_left_as_it_was_and_a_broken_one_is_refused():
    unet = build("sd2").train()
    pipeline, data, space = stub(unet), encoded_for(unet), discover(unet, include="mid_block.*", depth="all")
    output_changes(pipeline, space, space.depth_groups, data, 1, seed=0)
    assert all(module.training for module in unet.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    with torch.no_grad(), gated(unet, space):
        unet.conv_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        output_changes(pipeline, space, space.depth_groups, data, 1, seed=0)
    zero = build("sd2")
    zero.conv_out.weight.data.zero_()
    with pytest.raises(ValueError, match="cannot be compared"):
        joint_scores(torch.ones(space.num_width), stub(zero), space, data, 1, seed=0)


def test_samples_depend_on_seed_and_position_alone(unet):
    pipeline, data = stub(unet), encoded_for(unet)
    for source in (data, None):
        whole = next(iter(calibration_batches(pipeline, source, 6, 6, seed=3)))
        parts = list(calibration_batches(pipeline, source, 6, 4, seed=3))
        assert [len(batch) for batch in parts] == [4, 2] and [batch.index for batch in parts] == [0, 1]
        for name in ("timesteps", "latents", "noise"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in parts]), getattr(whole, name))
        joined = Call.cat([batch.call for batch in parts])
        assert all(torch.equal(joined[name], whole.call[name]) for name in ("sample", "encoder_hidden_states"))
        shares = [b.index for rank in (1, 0) for b in calibration_batches(pipeline, source, 6, 1, 3, share=(rank, 2))]
        assert shares == [1, 3, 5, 0, 2, 4]
        assert whole.timesteps.tolist() == [83, 250, 416, 583, 750, 916]
        fixed = next(iter(calibration_batches(pipeline, source, 6, 6, seed=3, timestep=7)))
        assert fixed.timesteps.unique().tolist() == [7] and torch.equal(fixed.noise, whole.noise)
        other = next(iter(calibration_batches(pipeline, source, 6, 6, seed=4)))
        assert not torch.equal(other.latents, whole.latents)
    chosen = next(iter(calibration_batches(pipeline, data, 8, 8, seed=0))).latents
    assert len({float(latent.sum()) for latent in chosen}) == 8  # no duplicates


def test_the_method_depth_removes_whole_layers_alone(unet):
    pipeline, data = stub(unet), encoded_for(unet)
    result = Depth(budget=0.8, samples=2).prune(pipeline, data)
    (architecture,) = result.architectures
    space = architecture.space
    assert architecture.values[: space.num_width].all() and architecture.removed()
    assert result.info.ratio[0] <= 0.8
    with pytest.raises(UserError, match="whole layers alone"):
        Depth(budget=0.09, samples=2).prune(pipeline, data)
    with pytest.raises(UserError, match=r"prune\.depth=all"):
        Depth(budget=0.8, depth="none").prune(pipeline, data)
