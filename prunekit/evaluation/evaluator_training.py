"""Training the evaluator on a data set's pictures, with the project's own trainer."""

from collections.abc import Callable
from pathlib import Path

import torch

from prunekit.data.images import CaptionedImages
from prunekit.evaluation.evaluator import Evaluator, EvaluatorConfig, vocabulary_of
from prunekit.training.contrastive import ContrastiveObjective
from prunekit.training.trainer import Trainer, TrainerConfig


def train_evaluator(
    data: CaptionedImages,
    config: TrainerConfig,
    directory: Path,
    seed: int,
    log: Callable[[dict], None] | None = None,
    shape: EvaluatorConfig | None = None,
) -> Evaluator:
    """Train an evaluator on every picture of `data`, save it to `directory`/evaluator, and return it as saved.

    Resumes from the checkpoints in `directory`/checkpoints, which it removes at the end.
    """
    shape = shape or EvaluatorConfig()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = [*data.names, *(data.captions[pair] for pair in data.training_pairs().tolist())]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        evaluator = Evaluator(shape, vocabulary_of(texts)).to(device)
    objective = ContrastiveObjective(evaluator, data, shape.size, config.batch_size, seed, device, config.precision)
    trainer = Trainer(config, objective, directory / "checkpoints", "evaluator", log)
    result = trainer.fit()
    info = {"seed": seed, **config.model_dump(mode="json"), **{k: round(v, 4) for k, v in result.items()}}
    evaluator.save_pretrained(directory / "evaluator", info)
    trainer.checkpoints.clear()
    return Evaluator.from_pretrained(directory / "evaluator")


def evaluator_training() -> TrainerConfig:
    """Return the settings that the embedded evaluator was trained with (about 12 minutes on one core)."""
    return TrainerConfig(
        steps=2600,
        batch_size=128,
        learning_rate=2e-3,
        warmup_steps=100,
        decay_share=0.6,
        weight_decay=0.02,
        precision="auto",
        log_every=50,
    )
