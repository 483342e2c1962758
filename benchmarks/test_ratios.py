"""Check ratios of times within one run against limits. Run: python -m pytest benchmarks/test_ratios.py -s."""

import time
from pathlib import Path

import pytest
import torch

import prunekit as pk
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.jobs.plan import Devices, plan, plan_all
from prunekit.jobs.recipe import load_recipe
from prunekit.jobs.run import start
from prunekit.measuring.interleaved import WarmUp, measure
from prunekit.methods.router import Router
from prunekit.report import write_report

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*_cc3m*.yaml"))
SUBJECTS = ("apple", "ball", "cube", "star", "cat", "dog", "tree", "house")
PROMPTS = [f"{color} {subject}" for subject in SUBJECTS for color in ("red", "green", "blue", "big")]
GPU = Devices(throughput=1e12, precision="bfloat16")


@pytest.fixture(scope="module")
def routed(pipeline):
    """Return the embedded model as four random experts with a random router."""
    space, draw = pk.discover(pipeline.unet), torch.Generator().manual_seed(0)
    experts = [pk.slice_unet(pipeline.unet, space.random(0.7, seed=seed)).eval() for seed in range(4)]
    router = Router(torch.randn(4, load_prompt_encoder().size, generator=draw), torch.zeros(4))
    made = pk.PromptRoutedPipeline.from_experts(pipeline, experts, router)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_routed_pipeline_takes_the_time_of_its_experts(routed):
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}
    experts = routed.route(PROMPTS).tolist()
    groups = [[p for p, own in zip(PROMPTS, experts, strict=True) if own == expert] for expert in range(4)]

    def alone():
        for expert, own in enumerate(groups):
            with routed.mixture.experts.use(expert) as unet:
                stock = routed.parts.pipeline(unet)
                stock.set_progress_bar_config(disable=True)
                for first in range(0, len(own), 8):
                    batch = sorted(own)[first : first + 8]
                    stock(batch, generator=[torch.Generator().manual_seed(0) for _ in batch], **options)

    arms = {"alone": alone, "routed": lambda: routed(PROMPTS, seeds=0, batch_size=8, **options)}
    measured = measure(arms, 7, "cpu", WarmUp(max_rounds=4))
    print("\n".join(measured.lines()))
    assert measured.ratio("routed").value <= 1.15


def test_plans_of_recipes_for_one_model_share_their_work():
    recipes = [load_recipe(path) for path in RECIPES]
    started = time.process_time()
    for recipe in recipes:
        plan(recipe, GPU)
    alone = time.process_time() - started
    plan_all(recipes, GPU)
    together = time.process_time() - started - alone
    print(f"\n{len(recipes)} plans: {alone:.1f} s of CPU time one by one, {together:.1f} s together")
    assert together <= 0.7 * alone


def test_a_report_is_quick_beside_its_run(tmp_path):
    started = time.process_time()
    directory = start("quickstart", ["scale=smoke"], tmp_path / "run")
    ran = time.process_time() - started
    write_report(directory)
    reported = time.process_time() - started - ran
    print(f"\nrun in small {ran:.1f} s of CPU time, its report again {reported:.1f} s")
    assert reported <= 0.25 * ran


def test_soft_costs_of_1000_architectures_beside_one_call(shape, space, unet):
    from prunekit.measuring.clock import timed_call, timed_inputs

    cost, gates = pk.CostModel(shape, space), torch.rand(1000, space.size, requires_grad=True)
    call = timed_call(unet, timed_inputs(unet, 1, 32, 77))

    def soft():
        gates.grad = None
        cost.macs(gates).sum().backward()

    with torch.no_grad():
        call()
    measured = measure({"call": torch.no_grad()(call), "soft costs": soft}, 5, "cpu", WarmUp(max_rounds=3))
    print("\n".join(measured.lines()))
    assert measured.ratio("soft costs").value <= 0.5
