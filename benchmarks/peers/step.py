"""Compare a search step and a fine-tuning step with the same mathematics written plainly (`plain.py`).

Both include the optimizer. prunekit uses encoded data, bfloat16 autocast and a teacher without gates. The plain step
encodes pictures and captions at every step, in float32, and its teacher runs under open gates. Both get decoded
pictures, and both keep or recompute activations alike.
Run: python benchmarks/peers/step.py [--model emoji | sd-2.1] [--batch 48] [--micro 48] [--stage search | fine_tuning]
[--recompute 1]; fine-tuning Stable Diffusion 2.1 takes about 20 GB (an estimate).
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import plain
import torch
from shared import compare, options, twin, where

import prunekit as pk
from prunekit.core.registry import process_of
from prunekit.data.emoji import load_emoji
from prunekit.data.encoded import EncodedData, encode
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.methods import APTP
from prunekit.methods.base import space_and_cost
from prunekit.methods.relaxation import gumbel
from prunekit.models import load_pipeline
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective
from prunekit.runtime.randomness import generator
from prunekit.training.memory import held
from prunekit.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))
from full_size import pipeline as sd21_pipeline

SEED, EXPERTS, BUDGET = 0, 4, 0.66


class World:
    """A pipeline, its encoded data, and the decoded pictures with their captions."""

    def __init__(
        self,
        name: str,
        batch: int,
        micro: int,
        recompute: bool = False,
        precision: str = "bfloat16",
        device: str | torch.device = "cpu",
    ):
        self.device = torch.device(device)
        self.pipeline = (load_pipeline("emoji") if name == "emoji" else sd21_pipeline()).to(self.device)
        self.resolution = 64 if name == "emoji" else 256
        images = load_emoji(None, 0.0).take(list(range(batch)))
        self.data: EncodedData = encode(self.pipeline, images, load_prompt_encoder("emoji"), self.resolution)
        self.pictures = images.pixels(list(range(batch)), self.resolution) / 127.5 - 1
        sizes = {"steps": 10**6, "batch_size": batch, "micro_batch": micro, "learning_rate": 1e-4}
        self.ours = {**sizes, "precision": precision, "gradient_checkpointing": recompute}
        self.unet = self.pipeline.unet.eval().requires_grad_(False)
        self.process = process_of(self.pipeline)

    def inputs(self, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a batch's pictures and captions; the plain step does this at every step."""
        captions = [self.data.images.captions[i] for i in pairs.tolist()]
        pictures = self.pictures[self.data.image_index[pairs]].to(self.device)
        return plain.encode(self.pipeline, pictures, captions)


def search(world: World, stack: ExitStack) -> dict[str, Callable[[], Any]]:
    """Return both search steps by name; prunekit's step returns its loss terms."""
    method = APTP(budget=BUDGET, experts=EXPERTS, warmup=1, search=world.ours)
    space, cost = space_and_cost(world.pipeline, method.config)
    unet, own, config = world.unet, twin(world.unet), method.config
    gates, own_gates = (stack.enter_context(pk.gated(each, space)) for each in (unet, own))
    stack.enter_context(held(config.search, own))
    if config.search.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        stack.callback(unet.disable_gradient_checkpointing)
    objective = method._objective(own, own_gates, cost, world.process, world.data)
    trainer = Trainer(config.search, objective, Path(stack.enter_context(TemporaryDirectory())), "search")
    objective.batch(1)
    optimizer = torch.optim.AdamW(trainer.parameters, lr=1e-4)
    steps = iter(range(2, 10**6))

    def ours() -> dict[str, torch.Tensor]:
        return trainer._step(next(steps), False)[0]

    def plainly() -> None:
        step, size = next(steps), config.search.batch_size
        drawn = objective.draw(step)
        for part in torch.arange(size).split(config.search.micro_batch):
            pairs = drawn.pairs[part]
            noises = [
                gumbel((rows, space.size), generator(SEED, purpose, step)).to(world.device)
                for purpose, rows in (("gates", EXPERTS), ("embeddings", len(part)))
            ]
            loss = plain.search_loss(
                *(unet, gates, objective.predictor, objective.codes.values, cost, world.process.scheduler, config),
                *world.inputs(pairs),
                *(
                    values.to(world.device)
                    for values in (world.data.prompts[pairs], drawn.plan.timesteps[part], drawn.plan.noise[part])
                ),
                *noises,
            )
            (loss * len(part) / size).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"plain": plainly, "prunekit": ours}


def fine_tuning(world: World, stack: ExitStack) -> dict[str, Callable[[], Any]]:
    """Return both fine-tuning steps of a UNet sliced to the budget; prunekit's step returns its loss terms."""
    unet, config = world.unet, FineTuneConfig(**world.ours, feature_blocks="none")
    space, cost = space_and_cost(world.pipeline, APTP(budget=BUDGET).config)
    scores = torch.randn(space.size, generator=generator(SEED, "step"))
    student = pk.slice_unet(unet, pk.methods.select(scores, cost, BUDGET)).train().requires_grad_(True)
    teacher = twin(unet)
    stack.enter_context(held(config, student, teacher))
    inputs = (student, teacher, world.process, world.data, world.data.training_pairs(), config, SEED)
    objective = FineTuningObjective(*inputs, unet.device)
    trainer = Trainer(config, objective, Path(stack.enter_context(TemporaryDirectory())), "fine-tuning")
    steps = iter(range(10**6))

    def ours() -> dict[str, torch.Tensor]:
        return trainer._step(next(steps), False)[0]

    def plainly() -> None:
        drawn = objective.batch(next(steps))
        with pk.gated(unet, space) as gates:
            for part in torch.arange(config.batch_size).split(config.micro_batch):
                pairs = objective.pairs[drawn.indices[part]]
                noise = (drawn.timesteps[part].to(world.device), drawn.noise[part].to(world.device))
                models = (student, unet, gates, world.process.scheduler, config)
                loss = plain.fine_tuning_loss(*models, *world.inputs(pairs), *noise)
                (loss * len(part) / config.batch_size).backward()
        trainer.optimizer.step()  # both steps share one optimizer, as the moments of two would not fit in memory
        trainer.optimizer.zero_grad()

    return {"plain": plainly, "prunekit": ours}


def main() -> None:
    """Print the tables."""
    given = options(__doc__.splitlines()[0], model="emoji", batch=48, micro=48, stage="both", recompute=0)
    where()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = World(given.model, given.batch, given.micro, bool(given.recompute), device=device)
    for stage in (search, fine_tuning):
        if given.stage in ("both", stage.__name__):
            with ExitStack() as stack:
                arms = stage(world, stack)
                title = f"{given.model}, {given.batch} samples: {stage.__name__} step"
                compare(title, arms, given.pairs, device=device)


if __name__ == "__main__":
    main()
