"""Fine-tuning: which blocks are distilled, when the teacher runs, and UNets with SDXL's added conditions."""

import pytest
import torch
from small_blocks import block_paths, outputs_of
from small_data import encoded_for, stub
from unets import build

from prunekit import discover
from prunekit.core.registry import process_of
from prunekit.core.space import Architecture
from prunekit.evaluation.agreement import agreement, agreement_samples
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective, fine_tune
from prunekit.slicing import slice_unet
from prunekit.training.distillation import block_outputs

SETTINGS = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}


def pair(shape):
    """Return (teacher, student); the student is sliced at random."""
    teacher = build(shape, layers_per_block=1)
    return teacher, slice_unet(teacher, discover(teacher).random(0.7, seed=1))


def objective_of(teacher, student, **changes):
    data, process = encoded_for(teacher), process_of(stub(teacher))
    config = FineTuneConfig(**{**SETTINGS, **changes})
    return FineTuningObjective(student, teacher, process, data, data.training_pairs(), config, 0, teacher.device)


@torch.no_grad()
def plain_distillation(objective, paths):
    """Compute Eq. 27-29 for the first batch directly from the outputs of the blocks at `paths`."""
    data, batch = objective.data, objective.batch(0)
    pairs = objective.pairs[batch.indices]
    noisy = objective.process.noised(data.latents[pairs], batch.noise, batch.timesteps)
    dropped = batch.drop < objective.config.caption_dropout
    text = torch.stack([data.null_text if drop else data.text[p] for p, drop in zip(pairs, dropped, strict=True)])
    arguments = {"encoder_hidden_states": text}
    if data.pooled is not None:
        rows = [data.null_pooled if drop else data.pooled[p] for p, drop in zip(pairs, dropped, strict=True)]
        time_ids = data.time_ids.repeat(len(pairs), 1)
        arguments["added_cond_kwargs"] = {"text_embeds": torch.stack(rows), "time_ids": time_ids}
    arguments |= {"sample": noisy, "timestep": batch.timesteps}
    outputs = [outputs_of(unet, paths, **arguments) for unet in (objective.student, objective.teacher)]
    return sum(float((a - b).square().mean()) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("shape", ["sd2", "sdxl"])
def test_feature_blocks_choose_what_is_distilled(shape):
    teacher, student = pair(shape)
    chosen = {"all": block_paths(teacher), "down_up": block_paths(teacher, mid=False), "none": []}
    for which, paths in chosen.items():
        objective = objective_of(teacher, student, feature_blocks=which, caption_dropout=0.5)
        dropped = objective.batch(0).drop < 0.5
        assert dropped.any() and not dropped.all()
        with torch.no_grad():
            terms = objective.micro_loss(objective.batch(0), torch.arange(4))
        assert float(terms["distillation"]) == pytest.approx(plain_distillation(objective, paths), rel=1e-5)
        with block_outputs(teacher, which) as outputs:
            objective.micro_loss(objective.batch(0), torch.arange(2))
        assert list(outputs) == paths
    assert FineTuneConfig(**SETTINGS).feature_blocks == "all"


def test_blocks_of_a_removed_stage_are_compared_where_shapes_agree():
    teacher = build("sd1")
    space = discover(teacher, "blocks")
    values = torch.ones(space.size, dtype=torch.bool)
    values[[space.slice(group) for group in space.groups if group.kind == "stage"][-1]] = False
    student = slice_unet(teacher, Architecture(space, values))
    terms = {}
    for which in ("all", "down_up", "none"):
        objective = objective_of(teacher, student, feature_blocks=which)
        terms[which] = float(objective.micro_loss(objective.batch(0), torch.arange(4))["distillation"].detach())
    assert terms["none"] < terms["down_up"]
    assert terms["down_up"] == terms["all"]  # the mid block's output has another size after the stage was removed


def test_without_distillation_the_teacher_does_not_run():
    teacher, student = pair("sd2")
    passes = []
    teacher.register_forward_hook(lambda *_: passes.append(1))
    for weight, expected in ((0.0, 0), (1.0, 1)):
        objective = objective_of(teacher, student, distillation_weight=weight, denoising_weight=1.0)
        terms = objective.micro_loss(objective.batch(0), torch.arange(4))
        assert len(passes) == expected and ("distillation" in terms) == bool(weight)


def test_an_sdxl_shaped_student_is_fine_tuned_and_measured(tmp_path):
    teacher, student = pair("sdxl")
    data, rows = encoded_for(teacher), []
    before = [parameter.detach().clone() for parameter in student.parameters()]
    conditions = data.conditions(torch.arange(len(data.text)))
    samples = agreement_samples(data.latents, conditions, stub(teacher), count=6)
    start = agreement(teacher, student, samples)
    config = FineTuneConfig(**{**SETTINGS, "steps": 8, "log_every": 1})
    figures = fine_tune(student, teacher, data, config, tmp_path, scheduler=stub(teacher).scheduler, log=rows.append)
    assert figures["steps"] == 8 and rows[-1]["distillation"] < rows[0]["distillation"]
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert agreement(teacher, teacher, samples) == 0 and agreement(teacher, student, samples) < start


def test_a_teacher_stays_as_it_was_and_a_second_call_returns_the_same_figures(tmp_path):
    """Once, the teacher stayed frozen and in evaluation mode. A run killed after its last checkpoint lost its loss."""
    teacher, student = pair("sd2")
    teacher.train().requires_grad_(True)
    teacher.conv_in.weight.requires_grad_(False)
    config, options = FineTuneConfig(**SETTINGS), {"scheduler": stub(teacher).scheduler}
    first = fine_tune(student, teacher, encoded_for(teacher), config, tmp_path, **options)
    assert all(part.training for part in teacher.modules())
    assert [name for name, weight in teacher.named_parameters() if not weight.requires_grad] == ["conv_in.weight"]
    fresh = pair("sd2")[1]
    again = fine_tune(fresh, teacher, encoded_for(teacher), config, tmp_path, **options)
    assert {"loss", "distillation"} <= set(first) and {**again, "seconds": 0} == {**first, "seconds": 0}
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), student.parameters(), strict=True))


def test_unknown_feature_blocks_are_refused():
    with pytest.raises(ValueError, match="down_up"):
        FineTuneConfig(**SETTINGS, feature_blocks="mid")
