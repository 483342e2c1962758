"""Compare a search of gates alone with a search that also trains a LoRA of the UNet, on the embedded model.

The search is for one architecture (Uni-Arch), so that nothing but the weights differs. Rows: gates alone; with a LoRA
that is discarded after the search, so that it affects only the choice of units; with a LoRA that is merged into the
weights before slicing. All rows are fine-tuned in the same way. The figure is the agreement with the dense model (mean
squared difference of predictions on fixed triples; lower is better), before and after fine-tuning.
Run: python benchmarks/joint_lora.py [--rank 16] [--steps 240] [--budget 0.5] [--seeds 0 1]
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from routing_pays import BF16, SEARCH, World
from torch import nn
from torch.nn.utils import parametrize

import prunekit as pk
from prunekit.core.registry import process_of
from prunekit.evaluation.agreement import agreement
from prunekit.methods import UniArch, select
from prunekit.methods.base import budget_cost
from prunekit.methods.uniarch import UniArchObjective
from prunekit.training.memory import held
from prunekit.training.trainer import Trainer

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj")
SCALE = 0.03  # of the adapters: they train at the gates' learning rate, which is 30 times too high for weights


class LowRank(nn.Module):
    """W + s B A for a linear or convolutional weight W (out, ...); the gate scales the layer's input."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.on = True

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + SCALE * (self.up @ self.down).view(weight.shape).to(weight) if self.on else weight


def adapters(unet: nn.Module, rank: int) -> list[LowRank]:
    """Put a LoRA on every layer that pruning cuts, and return the adapters."""
    layers = [module for name, module in unet.named_modules() if name.endswith(LAYERS)]
    made = [LowRank(layer.weight, rank) for layer in layers]
    for layer, own in zip(layers, made, strict=True):
        parametrize.register_parametrization(layer, "weight", own)
    return made


def merge(unet: nn.Module) -> None:
    """Replace each layer's weight by the sum of weight and LoRA."""
    for module in list(unet.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


class JointObjective(UniArchObjective):
    """The search of Uni-Arch that also trains adapters of the UNet; the teacher runs without them."""

    adapters: list[LowRank]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The trained modules."""
        return {"codes": self.codes, "adapters": nn.ModuleList(self.adapters)}

    def _teacher(self, *inputs):
        for own in self.adapters:
            own.on = False
        found = super()._teacher(*inputs)
        for own in self.adapters:
            own.on = True
        return found


def search(world: World, method: UniArch, rank: int):
    """Search; return the architecture, the UNet with its LoRA merged (unchanged for rank 0), and the seconds."""
    unet, config = copy.deepcopy(world.pipeline.unet).requires_grad_(False), method.config
    cost = budget_cost(world.pipeline, config)
    start = time.monotonic()
    with held(config.search, unet), pk.gated(unet, cost.space) as gates, tempfile.TemporaryDirectory() as folder:
        kind = JointObjective if rank else UniArchObjective
        inputs = (unet, gates, cost, process_of(world.pipeline), world.data, config, unet.device)
        objective = kind(*inputs)
        if rank:
            objective.adapters = adapters(unet, rank)
        Trainer(config.search, objective, Path(folder), "search").fit()
    seconds = time.monotonic() - start
    scores = objective.relaxation.scores(objective.codes.values.detach())[0]
    merge(unet)
    return select(scores, cost, config.budget), unet, seconds


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=240, help="fine-tuning steps")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    print("| seed | search | seconds | before fine-tuning | after |\n|---:|---|---:|---:|---:|")
    for seed in given.seeds:
        world = World(seed)
        method = UniArch(budget=given.budget, seed=seed, depth="aptp", search={**SEARCH, **BF16})
        dense = world.pipeline.unet
        alone, joint = search(world, method, 0), search(world, method, given.rank)
        rows = {
            "gates alone": (alone[0], dense, alone[2]),
            "with a LoRA, discarded": (joint[0], dense, joint[2]),
            "with a LoRA, merged": joint,
        }
        for name, (architecture, weights, seconds) in rows.items():
            student = pk.slice_unet(weights, architecture)
            before = agreement(world.reference, student, world.samples)
            after = agreement(world.reference, world.tune(student, world.pairs, given.steps), world.samples)
            print(f"| {seed} | {name} | {seconds:.0f} | {before:.4f} | {after:.4f} |", flush=True)


if __name__ == "__main__":
    main()
