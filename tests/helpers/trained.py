"""Train a search and a fine-tuning for the tests of several processes, and write the figures of every step.

Usage: python trained.py OUT [micro_batch]. Rank 0 writes OUT.json with the losses of both trainings, the search's
assignments and scores, and the chosen architectures.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from small_data import encoded_for, stub
from unets import build

import prunekit as pk
from prunekit.methods.aptp import expert_search as aptp_search
from prunekit.methods.aptp.method import APTP
from prunekit.methods.router import cosine_scores
from prunekit.recovery.fine_tuning import FineTuneConfig, fine_tune
from prunekit.runtime.processes import current

STEPS = 20
SEARCH = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1}


def main(out: str, micro_batch: int | None = None) -> None:
    """Run both trainings, and write OUT.json."""
    unet, seen = build("sd2"), []
    batch_of = aptp_search.SearchObjective.batch

    def batch(objective, step):
        drawn = batch_of(objective, step)
        scores = cosine_scores(drawn.embeddings.detach(), objective.codes.values.detach())
        seen.append({"assignment": drawn.assignment.tolist(), "scores": scores.tolist()})
        return drawn

    aptp_search.SearchObjective.batch = batch
    data, rows, tuned = encoded_for(unet, num=24), [], []
    settings = {"budget": 0.7, "experts": 3, "warmup": 5, "search": {**SEARCH, "micro_batch": micro_batch}}
    result = APTP(**settings).prune(stub(unet), data, log=rows.append)
    student = pk.slice_unet(unet, pk.discover(unet).random(keep=0.7, seed=0))
    config = FineTuneConfig(**{**SEARCH, "learning_rate": 1e-4}, micro_batch=micro_batch, denoising_weight=1.0)
    with TemporaryDirectory() as folder:
        folder = current().agree(folder)
        fine_tune(student, unet, data, config, Path(folder), scheduler=stub(unet).scheduler, log=tuned.append)
    if current().is_main:
        content = {
            "processes": current().count,
            "search": [row["loss"] for row in rows],
            "fine_tuning": [row["loss"] for row in tuned],
            "seen": seen,
            "chosen": [a.values.int().tolist() for a in result.architectures],
            "ratio": result.info.mixture_ratio,
            "weights": float(torch.cat([p.flatten() for p in student.parameters()]).double().square().sum()),
        }
        Path(out).with_suffix(".json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
