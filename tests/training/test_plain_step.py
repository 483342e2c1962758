"""prunekit's steps have the losses and gradients of a plain implementation; bfloat16 has them approximately."""

import sys
from pathlib import Path

import pytest
import torch
from small_data import encoded_for, stub
from unets import build

import prunekit as pk
from prunekit.core.registry import process_of
from prunekit.methods import APTP
from prunekit.methods.base import space_and_cost
from prunekit.methods.relaxation import gumbel
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective
from prunekit.runtime.randomness import generator

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
import plain

STEP, BATCH, MICRO = 3, 8, 3
TRAINING = {"steps": 5, "batch_size": BATCH, "learning_rate": 1e-3}
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}


def ours(objective, precision, batch):
    """Return the loss of a step in micro-batches, added up as in the trainer, and the gradients."""
    total = sum(float(value.detach()) for value in objective.shared_loss(batch).values())
    shared = objective.shared_loss(batch)
    if shared:
        sum(shared.values()).backward()
    for positions in torch.arange(BATCH).split(MICRO):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            terms = objective.micro_loss(batch, positions)
        sum(terms.values()).backward()
        total += sum(float(value.detach()) for value in terms.values())
    return total, taken(objective)


def taken(objective):
    parameters = [p for module in objective.modules.values() for p in module.parameters() if p.grad is not None]
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return gradient


@pytest.mark.parametrize("precision", TOLERANCE)
def test_a_search_step_is_the_plain_one(precision):
    unet = build("sd2").requires_grad_(False)
    data, method = encoded_for(unet, num=16), APTP(budget=0.7, experts=3, warmup=1, search=TRAINING)
    space, cost = space_and_cost(unet, method.config)
    with pk.gated(unet, space) as gates:
        objective = method._objective(unet, gates, cost, process_of(stub(unet)), data)
        objective.batch(1)  # initializes the codes
        batch = objective.batch(STEP)
        found, gradient = ours(objective, precision, batch)
        draws = {
            name: gumbel((rows, space.size), generator(0, purpose, STEP))
            for name, purpose, rows in (("code_noise", "gates", 3), ("embedding_noise", "embeddings", BATCH))
        }
        inputs = (data.latents[data.image_index[batch.pairs]], data.text[batch.pairs], data.prompts[batch.pairs])
        models = (
            unet,
            gates,
            objective.predictor,
            objective.codes.values,
            cost,
            objective.process.scheduler,
            method.config,
        )
        loss = plain.search_loss(*models, *inputs, batch.plan.timesteps, batch.plan.noise, **draws)
        loss.backward()
        expected = taken(objective)
    assert found == pytest.approx(float(loss.detach()), rel=TOLERANCE[precision])
    assert (gradient - expected).norm() <= 5 * TOLERANCE[precision] * expected.norm()


@pytest.mark.parametrize("precision", TOLERANCE)
def test_a_fine_tuning_step_is_the_plain_one(precision):
    unet = build("sd2").requires_grad_(False)
    space = pk.discover(unet)
    student = pk.slice_unet(unet, space.random(0.6, seed=0)).requires_grad_(True)
    data, process = encoded_for(unet, num=16), process_of(stub(unet))
    config = FineTuneConfig(**TRAINING, feature_blocks="none", caption_dropout=0.0, denoising_weight=0.5)
    inputs = (student, unet, process, data, data.training_pairs(), config, 0, torch.device("cpu"))
    objective = FineTuningObjective(*inputs)
    batch = objective.batch(STEP)
    found, gradient = ours(objective, precision, batch)
    pairs = objective.pairs[batch.indices]
    with pk.gated(unet, space) as gates:
        drawn = (data.latents[data.image_index[pairs]], data.text[pairs], batch.timesteps, batch.noise)
        loss = plain.fine_tuning_loss(student, unet, gates, process.scheduler, config, *drawn)
        loss.backward()
        expected = taken(objective)
    assert found == pytest.approx(float(loss.detach()), rel=TOLERANCE[precision])
    assert (gradient - expected).norm() <= 5 * TOLERANCE[precision] * expected.norm()
