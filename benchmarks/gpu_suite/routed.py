"""Compare pictures of the routed pipeline and of the server, if it is installed, with the CPU's pictures."""

from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import small_model
import torch

import prunekit as pk
from benchmarks.gpu_suite import server
from benchmarks.gpu_suite.record import Found, Piece, Settings
from benchmarks.gpu_suite.reference import (
    CPU,
    DTYPES,
    MODES,
    SAMPLING,
    TOLERANCES,
    applies,
    compared,
    exact_float32,
    running,
)
from prunekit.core.registry import denoiser_in, latent_size, text_length
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.jobs.bench.modes import Mode
from prunekit.measuring.clock import timed_inputs
from prunekit.methods.router import Router
from prunekit.models import load_pipeline

EXPERTS, GUIDANCE, STEPS = 2, 2.0, 2
PROMPTS = [f"{color} {subject}" for subject in ("apple", "ball", "cube", "star") for color in ("red", "green")]


def pieces(settings: Settings) -> list[Piece]:
    """Return the pieces of the smoke test that generate pictures."""
    modes = [mode for mode in MODES if mode != "compiled" or not settings.reduced]  # two UNets take long to compile
    found = [
        Piece(f"routed pipeline, {dtype}, {mode}", partial(drawing, settings, dtype, mode))
        for mode in modes
        for dtype in DTYPES
    ]
    return [*found, Piece("server", partial(served, settings))]


@cache
def folder() -> Path:
    """Write a small pipeline to a temporary folder, which is deleted when the process ends; return the folder."""
    keeper = TemporaryDirectory()
    folder.keeper = keeper  # type: ignore[attr-defined]
    return small_model.write_pipeline(Path(keeper.name) / "model", layers=1)


def mixture(pipeline: Any, experts: int = EXPERTS, keep: float = 0.6) -> pk.PromptRoutedPipeline:
    """Return a routed pipeline of several experts, pruned at random, with a random router that uses all of them."""
    model = denoiser_in(pipeline)
    space = pk.discover(model)
    sliced = [pk.slice_model(model, space.random(keep, seed=seed)) for seed in range(experts)]
    made = pk.PromptRoutedPipeline.from_experts(pipeline, sliced, router(experts), guidance=GUIDANCE)
    made.set_progress_bar_config(disable=True)
    return made


def router(experts: int) -> Router:
    """Return a random router whose mean score over the prompts is 0 for each expert, so that it uses all experts."""
    z = load_prompt_encoder().encode(PROMPTS)
    weight = torch.randn(experts, z.shape[1], generator=torch.Generator().manual_seed(0))
    return Router(weight, -(z @ weight.T).mean(dim=0))


def drawing(settings: Settings, dtype: str, mode: Mode) -> Found:
    """Compare pictures of a small routed pipeline with the CPU's: same prompts, seeds and rounded weights, batch 1."""
    if reason := applies(mode, settings.device):
        return Found(left_out=[f"{mode}: {reason}"])
    with exact_float32(), ExitStack() as stack:
        rounded = load_pipeline(folder()).to(CPU, DTYPES[dtype])
        here = mixture(load_pipeline(folder())).to(settings.device, DTYPES[dtype])
        there = mixture(rounded.to(CPU, torch.float32))
        if mode != "eager":
            experts = [stack.enter_context(here.mixture.experts.use(index)) for index in range(EXPERTS)]
            tokens, sides = text_length(rounded), latent_size(experts[0])
            calls = [(expert, timed_inputs(expert, 2, sides, tokens)) for expert in experts]
            stack.enter_context(running(calls, mode, settings.reduced))
        drawn, expected = (draw(pipeline, "pt") for pipeline in (here, there))
    found = Found(comparisons=[compared("pictures", drawn.images, expected.images, SAMPLING * TOLERANCES[dtype])])
    assert drawn.experts == expected.experts and len(set(drawn.experts)) == EXPERTS, drawn.experts
    return found


def draw(pipeline: pk.PromptRoutedPipeline, output_type: str) -> Any:
    """Generate a picture for each prompt, one picture per call of the model."""
    return pipeline(PROMPTS, seeds=0, num_inference_steps=STEPS, output_type=output_type)


def served(settings: Settings) -> Found:
    """Compare the server's pictures with those of the pipeline on the CPU; the tolerance includes PNG's 256 levels."""
    if not server.is_there():
        return Found(left_out=[f"{server.MODULE}: not in this version, or fastapi is not installed"])
    pipeline = mixture(load_pipeline(folder()))
    expected = draw(pipeline, "pt").images
    with TemporaryDirectory() as temporary:
        pipeline.save_pretrained(Path(temporary) / "routed")
        with server.serving(Path(temporary) / "routed", settings.device) as address:
            images = [server.picture(address, prompt, 0, STEPS) for prompt in PROMPTS]
    tolerance = 1 / 256 + SAMPLING * TOLERANCES["float32"]
    return Found(comparisons=[compared("pictures of the server", torch.stack(images), expected, tolerance)])
