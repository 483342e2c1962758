"""Benchmarks of prunekit's hot paths. Run: python -m pytest benchmarks --benchmark-enable."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

import prunekit as pk
from prunekit.core.gates import gated
from prunekit.denoisers.unet.family import StableDiffusion
from prunekit.measuring.clock import timed_inputs
from prunekit.methods.aptp.expert_search import APTPConfig, SearchObjective
from prunekit.methods.router import ArchitecturePredictor, Router
from prunekit.methods.search import Codes
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective
from prunekit.training.trainer import Objective

CPU = torch.device("cpu")
BATCH = 32


def test_discover(benchmark, shape):
    space = benchmark(pk.discover, shape)
    assert space.size == 1620


def test_cost_model(benchmark, shape, space):
    cost = benchmark(pk.CostModel, shape, space)
    assert cost.dense_macs == 1_074_552_872_960


def test_macs_of_1000_soft_architectures_with_gradient(benchmark, shape, space):
    cost = pk.CostModel(shape, space)
    gates = torch.rand(1000, space.size, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def macs():
        gates.grad = None
        cost.macs(gates).sum().backward()

    benchmark(macs)
    assert gates.grad.isfinite().all()


@pytest.mark.parametrize("depth", ["aptp", "all"])
def test_set_gates(benchmark, unet, depth):
    space = pk.discover(unet, depth)
    g = torch.rand(8, space.size, generator=torch.Generator().manual_seed(0))
    with gated(unet, space) as gates:
        benchmark(gates.set, g)


@pytest.mark.parametrize("how", ["stock", "gated"])
def test_forward(benchmark, unet, space, how):
    inputs = timed_inputs(unet, 1, 32, 77)
    with torch.no_grad():
        if how == "stock":
            benchmark.pedantic(lambda: unet(**inputs), rounds=3, warmup_rounds=1)
            return
        with gated(unet, space) as gates:
            gates.set(space.random(0.7))
            benchmark.pedantic(lambda: unet(**inputs), rounds=3, warmup_rounds=1)


def test_slice_unet(benchmark, unet, space):
    pruned = benchmark.pedantic(pk.slice_unet, (unet, space.random(0.7)), rounds=5, warmup_rounds=1)
    assert pruned.config.pruning["kept"]


def test_route_50000_embedded_prompts(benchmark):
    draw = torch.Generator().manual_seed(0)
    router = Router(torch.randn(8, 128, generator=draw), torch.randn(8, generator=draw))
    prompts = torch.randn(50_000, 128, generator=draw)
    assert benchmark(router.route, prompts).max() < 8


def step(objective: Objective, number: int) -> None:
    """Run one training step on its whole batch, without the optimizer."""
    batch = objective.batch(number)
    with torch.autocast("cpu", torch.bfloat16):
        terms = [*objective.shared_loss(batch).values(), *objective.micro_loss(batch, torch.arange(BATCH)).values()]
    torch.stack([term.float() for term in terms]).sum().backward()


def test_search_step(benchmark, pipeline, data, tmp_path: Path):
    unet = pipeline.unet.eval().requires_grad_(False)
    space = pk.discover(unet)
    search = {"steps": 1000, "batch_size": BATCH, "learning_rate": 1e-3}
    config = APTPConfig(budget=0.7, warmup=1, search=search)
    cost, process = (
        pk.CostModel(unet, space, text_length=16),
        StableDiffusion().process(DDPMScheduler(prediction_type="v_prediction")),
    )
    with gated(unet, space) as gates:
        parts = (ArchitecturePredictor(128, space.size), Codes(8, space.size))
        objective = SearchObjective(unet, gates, *parts, cost, process, data, config, CPU)
        benchmark.pedantic(step, (objective, 1), rounds=10, warmup_rounds=2)


def test_fine_tuning_step(benchmark, pipeline, data):
    teacher = pipeline.unet.eval().requires_grad_(False)
    student = pk.slice_unet(teacher, pk.discover(teacher).random(0.7)).train().requires_grad_(True)
    config = FineTuneConfig(steps=1000, batch_size=BATCH, learning_rate=1e-3)
    process = StableDiffusion().process(DDPMScheduler(prediction_type="v_prediction"))
    objective = FineTuningObjective(student, teacher, process, data, data.training_pairs(), config, 0, CPU)
    benchmark.pedantic(step, (objective, 1), rounds=10, warmup_rounds=2)
