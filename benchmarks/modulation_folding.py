"""Measure the parameters that folding a transformer's modulation layers saves, and the error that it adds.

    python benchmarks/modulation_folding.py sizes     parameters of full-size models before and after, without weights
    python benchmarks/modulation_folding.py emoji     error by rank of the embedded transformer, which is trained

Each prints a table in Markdown.
"""

import sys

import torch

from prunekit.core.modulation import FORMAT
from prunekit.core.registry import denoiser_of
from prunekit.data.emoji import load_emoji
from prunekit.export.folding import errors_by_rank, fold_modulation, modulation_of, output_errors, record_modulation
from prunekit.models import load_pipeline, load_shape

MODELS = ("qwen-image", "flux.1-dev", "sd-3.5-medium", "sd-3.5-large")
FOLDINGS = (("table", 50), ("rank", 16), ("rank", 64), ("rank", 256))
RANKS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160)
GUIDANCE, STEPS, HELD_OUT_STEPS, SAMPLED_STEPS = 3.0, 28, 20, 8
CAPTIONS, HELD_OUT, SAMPLED = 320, 80, 16


def sizes() -> None:
    """Print the parameters of models on the meta device, before and after folding."""
    print("| model | parameters | in modulation layers | folded to | parameters after | saved |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        model = load_shape(name).denoiser
        modulation = modulation_of(model)
        before = count(model.parameters())
        held = count(linear.weight for linear in modulation.linears(model).values())
        for kind, size in FOLDINGS:
            if kind == "table" and not modulation.of_timestep_alone:
                continue
            folding = {"format": FORMAT, "kind": kind}
            folding |= {"timesteps": list(range(size)), "nearest": False} if kind == "table" else {"rank": size}
            with torch.device("meta"):
                folded = denoiser_of(model).pruned_class()(**model.config, folding=folding)
            after = count(folded.parameters())
            share, saved = (f"{100 * part / before:.1f} %" for part in (held, before - after))
            what = "a table of 50 steps" if kind == "table" else f"rank {size}"
            print(f"| {name} | {before:,} | {held:,} ({share}) | {what} | {after:,} | {saved} |", flush=True)


def emoji() -> None:
    """Print the embedded transformer's error by rank, on captions and timesteps that were not used for the fit."""
    pipeline = load_pipeline("emoji-sd3")
    model = pipeline.transformer
    captions = [text for text in load_emoji(None, 0.0).captions if text]
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    fitted, held_out = order[:CAPTIONS], order[CAPTIONS : CAPTIONS + HELD_OUT]
    seen = record_modulation(pipeline, [captions[i] for i in fitted], GUIDANCE, 32, num_inference_steps=STEPS)
    unseen = record_modulation(
        pipeline, [captions[i] for i in held_out], GUIDANCE, 32, num_inference_steps=HELD_OUT_STEPS
    )
    rows = errors_by_rank(model, seen, unseen, RANKS)
    alone = torch.nn.Linear(seen.inputs.shape[1], seen.inputs.shape[1], bias=False)
    torch.nn.init.eye_(alone.weight)  # an identity: the error of the vectors, without the modulation layers
    plain = [row["error"] for row in errors_by_rank(model, seen, unseen, RANKS, [alone])]
    folded = {str(rank): fold_modulation(model, seen, rank) for rank in RANKS}
    errors = output_errors(
        pipeline,
        {name: made.model for name, made in folded.items()},
        [captions[i] for i in held_out[:SAMPLED]],
        GUIDANCE,
        num_inference_steps=SAMPLED_STEPS,
        generator=torch.Generator().manual_seed(0),
    )
    before = count(model.parameters())
    print(f"{len(seen.timesteps)} vectors fitted, {len(unseen.timesteps)} held out; {before:,} parameters unfolded.\n")
    print("| rank | parameters | saved | modulation error | its worst layer | plain | output error, mean | largest |")
    print("|---|---|---|---|---|---|---|---|")
    for row, other in zip(rows, plain, strict=True):
        name, after = str(row["rank"]), folded[str(row["rank"])].report["after"]["parameters"]
        numbers = (row["error"], row["worst_layer"], other, errors[name]["mean"], errors[name]["max"])
        saved = f"{100 * (before - after) / before:.1f} %"
        print(f"| {name} | {after:,} | {saved} | {' | '.join(f'{100 * number:.2f} %' for number in numbers)} |")


def count(tensors) -> int:
    """Return the number of elements of tensors."""
    return sum(tensor.numel() for tensor in tensors)


if __name__ == "__main__":
    {"sizes": sizes, "emoji": emoji}[sys.argv[1]]()
