"""Compare one architecture, separate experts and experts of a shared backbone, over the number of training steps.

Embedded model, one seed. Each row searches once, and is then fine-tuned from the search's result for each total number
of steps: N separate experts take 1/N of the steps each, and a shared backbone takes all steps, with --per-step experts
in each. The figure is the agreement with the dense model (mean squared difference of predictions on fixed triples;
lower is better); no pictures are generated. --pull s cuts the experts by their mean scores plus s times each expert's
difference from the mean: 1 changes nothing, 0 gives one architecture. --file stores finished figures: start the same
command again to resume a stopped run.
Run: python benchmarks/routing_pays.py [--steps 240 960] [--experts 4] [--budget 0.5] [--seed 0] [--codes random]
[--pull 1] [--per-step 2] [--file FILE]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import prunekit as pk
from prunekit.data.emoji import load_emoji
from prunekit.data.encoded import EncodedData, encode
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.evaluation.agreement import agreement, data_samples, predictions
from prunekit.methods import APTP, PruneResult, UniArch, select_mixture
from prunekit.models import load_pipeline
from prunekit.recovery.fine_tuning import FineTuneConfig, fine_tune
from prunekit.runtime.files import read_json, write_json

SEARCH = {"steps": 240, "batch_size": 48, "learning_rate": 3e-2, "warmup_steps": 20, "weight_decay": 0.0}
TUNING = {"batch_size": 32, "learning_rate": 5e-4, "warmup_steps": 20, "decay_share": 0.4}
BF16 = {"precision": "bfloat16"}


class Pulled(APTP):
    """APTP that pulls the experts' scores towards their mean before the cut; the router does not change."""

    pull = 1.0

    def _decide(self, objective):
        result = super()._decide(objective)
        if self.pull != 1:
            scores = objective.relaxation.scores(objective.codes.values.detach()).cpu()
            counts = torch.tensor(result.info.prompts_per_expert)
            mean = (scores * counts[:, None] / counts.sum()).sum(0, keepdim=True)
            pulled = mean + self.pull * (scores - mean)
            result.architectures = select_mixture(pulled, counts, objective.cost, self.config.budget)
        return result


class World:
    """The embedded model, its data, and the samples on which every model is measured."""

    def __init__(self, seed: int, per_step: int = 2):
        self.seed, self.per_step, self.pipeline = seed, per_step, load_pipeline("emoji")
        self.data: EncodedData = encode(self.pipeline, load_emoji(None, 0.1), load_prompt_encoder("emoji"), 64)
        self.pairs = self.data.training_pairs()
        self.samples = data_samples(self.data, self.pipeline, seed)
        self.reference = predictions(self.pipeline.unet, self.samples)

    def search(self, method: pk.methods.Method) -> PruneResult:
        """Return a method's result."""
        return method.prune(self.pipeline, self.data)

    def tuning(self, steps: int, **changes: Any) -> FineTuneConfig:
        """Return the settings of fine-tuning."""
        return FineTuneConfig(steps=steps, experts_per_step=self.per_step, **TUNING, **BF16, **changes)

    def tune(self, unet, pairs: torch.Tensor, steps: int):
        """Fine-tune a UNet on some pairs, and return it."""
        options: dict[str, Any] = {"scheduler": self.pipeline.scheduler, "pairs": pairs, "seed": self.seed}
        with tempfile.TemporaryDirectory() as folder:
            fine_tune(unet, self.pipeline.unet, self.data, self.tuning(steps), Path(folder), **options)
        return unet

    def routes(self, result: PruneResult, pairs: torch.Tensor) -> torch.Tensor:
        """Return each pair's expert."""
        if result.router is None:
            return torch.zeros(len(pairs), dtype=torch.long)
        return result.router.route(self.data.prompts[pairs])

    def experts_of_their_own(self, result: PruneResult, steps: int) -> list:
        """Return separate experts, each fine-tuned for an equal part of the steps."""
        config = self.tuning(steps // len(result.architectures))
        return pk.recover_experts(result, self.pipeline, self.data, config, seed=self.seed)

    def shared_backbone(self, result: PruneResult, steps: int) -> list:
        """Return experts sliced from one backbone that was fine-tuned for all steps."""
        config = self.tuning(steps, shared_backbone=True)
        return pk.recover_experts(result, self.pipeline, self.data, config, seed=self.seed)

    def error(self, result: PruneResult, unets: list) -> float:
        """Return the agreement of the UNets with the dense model under the result's routing."""
        routes = self.routes(result, self.samples.indices)
        return agreement(self.reference, unets, self.samples, routes)


def main() -> None:
    """Print one line per figure, then the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[240, 960])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codes", default="random", help="initial values of the codes")
    parser.add_argument("--pull", type=float, default=1.0)
    parser.add_argument("--per-step", type=int, default=2, help="experts per training step of the backbone")
    parser.add_argument("--file", type=Path, help="JSON file of finished figures")
    given = parser.parse_args()
    world, common = World(given.seed, given.per_step), {"budget": given.budget, "seed": given.seed, "depth": "aptp"}
    search = {**SEARCH, **BF16}
    setting = ", ".join(f"{name} {value}" for name, value in vars(given).items() if name not in ("steps", "file"))
    mixture = Pulled(**common, experts=given.experts, codes=given.codes, warmup=80, search=search)
    mixture.pull = given.pull
    rows = {
        "one architecture": (UniArch(**common, search=search), world.experts_of_their_own),
        "experts of their own": (mixture, world.experts_of_their_own),
        "shared backbone": (mixture, world.shared_backbone),
    }
    found = read_json(given.file) if given.file and given.file.is_file() else {}
    chosen: dict[str, PruneResult] = {}  # by method
    for name, (method, made) in rows.items():
        for steps in given.steps:
            key = f"{name}, {steps} steps, {setting}"
            if key not in found:
                if method.name not in chosen:
                    chosen[method.name] = world.search(method)
                result = chosen[method.name]
                found[key] = world.error(result, made(result, steps))
                print(f"{key}: {found[key]:.4f}", flush=True)
                if given.file:
                    write_json(given.file, found)
    print("| total steps | " + " | ".join(map(str, given.steps)) + " |\n|---|" + "---:|" * len(given.steps))
    for name in rows:
        keys = (f"{name}, {steps} steps, {setting}" for steps in given.steps)
        print(f"| {name} | " + " | ".join(f"{found[key]:.4f}" for key in keys) + " |")


if __name__ == "__main__":
    main()
