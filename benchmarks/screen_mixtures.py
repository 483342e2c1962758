"""Compare variants of mixtures at equal exact MACs and equal total training compute, on held-out pictures.

The variants prune the embedded model to half of its MACs. Every variant spends TOTAL forward passes of the dense model
on choice and training together, as the protocol `equal_total` of comparisons counts them. Screening uses only pictures
of the training split, and holds out 20 % of them. The figure is the agreement with the dense model on these held-out
pictures (mean squared difference of predictions on 512 fixed triples; lower is better), with its standard error over
the triples. The last column is the agreement on training pictures. --file stores finished figures: start the same
command again to resume a stopped run.
Run: python benchmarks/screen_mixtures.py [--total 60000] [--seed 0] [--budget 0.5] [--file FILE] [VARIANT ...]
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import prunekit as pk
from prunekit.data.config import DataConfig, load_data
from prunekit.data.encoded import EncodedData, encode
from prunekit.data.holdout import hold_out
from prunekit.data.images import HELD_OUT, TRAINING
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.evaluation.agreement import agreement_errors, data_samples, predictions
from prunekit.methods import PruneResult, registry
from prunekit.methods.base import space_of
from prunekit.models import load_pipeline
from prunekit.runtime.files import read_json, write_json

TUNING = {"batch_size": 32, "learning_rate": 5e-4, "decay_share": 0.4, "precision": "float32"}
SEARCH = {"steps": 240, "batch_size": 48, "learning_rate": 3e-2, "warmup_steps": 20, "weight_decay": 0.0}
SEARCH |= {"precision": "float32"}
TAYLOR = {"samples": 128, "batch_size": 32, "num_timesteps": 25, "precision": "float32"}
ONE = {"choice": "taylor_sp", "choice_settings": TAYLOR, "sampling_steps": 20}
SHARED = {"shared_backbone": True}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # the method, its settings, fine-tuning settings
    "static, taylor_sp": ("taylor_sp", TAYLOR, {}),
    "static, uniarch": ("uniarch", {"search": SEARCH}, {}),
    "static, obs": ("obs", {"precision": "float32"}, {}),
    "masks by prompt": ("aptp", {"experts": 4, "warmup": 80, "search": SEARCH}, SHARED),
    "masks by timestep": ("timestep_experts", {"bins": 3, "scores": "taylor_sp", "score": TAYLOR}, SHARED),
    "differences by prompt": ("one_mask", {**ONE, "experts": 4, "bins": 1}, {**SHARED, "deltas": {"rank": 8}}),
    "differences by timestep": ("one_mask", {**ONE, "bins": 3}, {**SHARED, "deltas": {"rank": 8}}),
    "biases and norms by timestep": ("one_mask", {**ONE, "bins": 3}, {**SHARED, "deltas": {"rank": 0}}),
    "differences by both": ("one_mask", {**ONE, "experts": 3, "bins": 3}, {**SHARED, "deltas": {"rank": 4}}),
    "masks and differences by timestep": (
        "timestep_experts",
        {"bins": 3, "scores": "taylor_sp", "score": TAYLOR},
        {**SHARED, "deltas": {"rank": 8}},
    ),
    "differences by timestep, rank 32": ("one_mask", {**ONE, "bins": 3}, {**SHARED, "deltas": {"rank": 32}}),
    "differences by timestep, 6 bins": ("one_mask", {**ONE, "bins": 6}, {**SHARED, "deltas": {"rank": 8}}),
}


class World:
    """The embedded model, the training split's pictures (20 % held out again), and the samples for measuring."""

    def __init__(self, seed: int, budget: float, total: float):
        self.seed, self.budget, self.total = seed, budget, total
        self.pipeline = load_pipeline("emoji")
        images = load_data(DataConfig(kind="emoji", holdout=0.2), 0).of_split(TRAINING)
        held = hold_out("pictures", images.encoded, images.captions, images.image_index, 0.2, 1)
        images = replace(images, held_out=held.pairs, holdout_by="pictures", held_by_closure=held.by_closure)
        self.data: EncodedData = encode(self.pipeline, images, load_prompt_encoder("emoji"), 64)
        self.samples = {
            name: data_samples(self.data, self.pipeline, 0, 512, self.data.images.pairs_of(split))
            for name, split in (("held out", HELD_OUT), ("training", TRAINING))
        }
        self.references = {name: predictions(self.pipeline.unet, samples) for name, samples in self.samples.items()}

    def figures(self, method: str, settings: dict[str, Any], tuning: dict[str, Any]) -> dict[str, Any]:
        """Run the method, fine-tune for the rest of the compute, and return the figures."""
        started = time.time()
        chooser = registry.get(method)(budget=self.budget, seed=self.seed, depth="aptp", **settings)
        space = space_of(self.pipeline, chooser.config)
        result: PruneResult = chooser.prune(self.pipeline, self.data)
        config = pk.FineTuneConfig(steps=1, **TUNING, **tuning)
        step = config.batch_size * config.dense_passes(result.info.mean_ratio)
        steps = int((self.total - chooser.work(space).dense_passes) / step)
        config = config.model_copy(update={"steps": steps, "warmup_steps": max(1, steps // 12)})
        with tempfile.TemporaryDirectory() as folder:
            models = pk.recover_experts(result, self.pipeline, self.data, config, folder, self.seed)
        figures: dict[str, Any] = {"steps": steps, "macs_ratio": result.info.mean_ratio}
        for name, samples in self.samples.items():
            experts = torch.zeros(len(samples.indices), dtype=torch.long)
            if result.router is not None:
                experts = result.router.route_rows(self.data.prompts, samples.indices)
            errors = agreement_errors(self.references[name], models, samples, experts)
            figures[name] = float(errors.mean())
            figures[f"{name}, error"] = float(errors.std() / len(errors) ** 0.5)
        return {**figures, "minutes": round((time.time() - started) / 60, 1)}


def main() -> None:
    """Print one line per variant, then the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", help="default: all variants")
    parser.add_argument("--total", type=float, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--file", type=Path, default=Path("screen_mixtures.json"))
    given = parser.parse_args()
    finished = read_json(given.file) if given.file.is_file() else {}
    world = None
    keys = {name: f"{name}; {given.budget}; {given.total:g}; seed {given.seed}" for name in given.variants or VARIANTS}
    for name, key in keys.items():
        if key not in finished:
            world = world or World(given.seed, given.budget, given.total)
            finished[key] = world.figures(*VARIANTS[name])
            write_json(given.file, finished)
        print(f"{key}: {finished[key]}", flush=True)
    print("| variant | steps | held out | training |\n|---|---:|---:|---:|")
    for name, key in keys.items():
        row = finished[key]
        held, error = row["held out"], row["held out, error"]
        print(f"| {name} | {row['steps']} | {held:.4f} ± {error:.4f} | {row['training']:.4f} |")


if __name__ == "__main__":
    main()
