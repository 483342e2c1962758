"""Low-rank fine-tuning: only the changes are trained, they are merged exactly on request, and training resumes."""

import copy

import pytest
import torch
from small_data import encoded_for, stub
from unets import build, inputs, relative_error

from prunekit import FineTuneConfig, fine_tune
from prunekit.core.slicing import slice_model
from prunekit.methods import Random
from prunekit.recovery.low_rank import LoraConfig, attach, merge, merged, num_changes

pytest.importorskip("peft")
SETTINGS = {"batch_size": 2, "learning_rate": 1e-3, "precision": "float32", "log_every": 1}


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    unet = build("sd2").eval().requires_grad_(False)
    return unet, encoded_for(unet, num=8), Random(budget=0.6, depth="all").prune(unet).architectures[0]


def run(unet):
    with torch.no_grad():
        return unet(**inputs(unet, size=8)).sample


def changed_somewhat(unet):
    """Attach low-rank changes to a model, with weights that are not 0."""
    attach(unet, LoraConfig(rank=2), seed=1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)


def test_only_the_changes_train_and_they_begin_at_zero(world):
    unet, _, architecture = world
    student = slice_model(unet, architecture)
    plain, count = run(student), num_changes(student, LoraConfig(rank=2))
    attach(student, LoraConfig(rank=2), seed=1)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == count
    assert torch.equal(run(student), plain)


def test_merged_for_a_while_it_is_as_before_to_the_bit(world):
    unet, _, architecture = world
    student = slice_model(unet, architecture)
    changed_somewhat(student)
    adapted, names = run(student), list(student.state_dict())
    with merged(student):
        assert not any("lora" in name for name in student.state_dict())
        assert relative_error(run(student), adapted) <= 1e-5
    assert list(student.state_dict()) == names and torch.equal(run(student), adapted)
    merge(student)
    assert not any("lora" in name for name in student.state_dict())
    assert relative_error(run(student), adapted) <= 1e-5
    assert relative_error(run(student), run(slice_model(unet, architecture))) > 1e-3


def test_a_merge_that_fails_half_way_is_undone(world, monkeypatch):
    unet, _, architecture = world
    student = slice_model(unet, architecture)
    changed_somewhat(student)
    adapted, state = run(student), {name: value.clone() for name, value in student.state_dict().items()}

    def failing():
        raise MemoryError

    monkeypatch.setattr(student.mid_block.resnets[0].conv1, "merge", failing)
    with pytest.raises(MemoryError), merged(student):
        pass
    after = student.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(run(student), adapted)


def test_fine_tuning_leaves_a_plain_model_and_resumes_where_it_was(world, tmp_path):
    unet, data, architecture = world
    whole, halves = slice_model(unet, architecture), [slice_model(unet, architecture) for _ in range(2)]
    kept = {}
    config = FineTuneConfig(steps=4, lora=LoraConfig(rank=2, learning_rate=1e-2), **SETTINGS)
    arguments = {"teacher": unet, "data": data, "scheduler": stub(unet).scheduler, "seed": 3}
    milestones = {2: lambda: kept.update(model=copy.deepcopy(whole))}
    fine_tune(whole, config=config, directory=tmp_path / "whole", milestones=milestones, **arguments)
    assert not any("lora" in name for name in whole.state_dict())
    assert not any("lora" in name for name in kept["model"].state_dict())
    assert relative_error(run(whole), run(slice_model(unet, architecture))) > 1e-4

    class StopHereError(Exception):
        pass

    def stop():
        raise StopHereError

    saving = config.model_copy(update={"checkpoint_steps": 1})
    with pytest.raises(StopHereError):
        fine_tune(halves[0], config=saving, directory=tmp_path / "half", milestones={3: stop}, **arguments)
    fine_tune(halves[1], config=saving, directory=tmp_path / "half", **arguments)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves[1].parameters(), strict=True))


def test_a_shared_backbone_has_no_changes_of_its_own():
    with pytest.raises(ValueError, match="exclude each other"):
        FineTuneConfig(steps=1, lora={"rank": 2}, shared_backbone=True, **SETTINGS)


def test_a_frozen_backward_pass_counts_as_one():
    full, low = (FineTuneConfig(steps=1, lora=lora, **SETTINGS) for lora in (None, LoraConfig(rank=2)))
    assert (full.dense_passes(0.5), low.dense_passes(0.5)) == (2.5, 2.0)


def test_a_depthwise_convolution_stays():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Conv2d(4, 6, 1))
    config = LoraConfig(rank=2)
    count = num_changes(model, config)
    attach(model, config, seed=1)
    assert count == 2 * (4 + 6) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    merge(model)
    assert [type(layer) for layer in model] == [torch.nn.Conv2d] * 2
