"""Pre-training uses only pictures with a training caption, each with its own captions."""

import pytest
import torch
import yaml
from small_model import SHAPES, TRAINING, write_world

from prunekit.data.config import DataConfig, load_data
from prunekit.embedded.unet_training import TrainingPairs
from prunekit.jobs.run import start
from prunekit.runtime.files import read_json

HELD = [{"holdout": 0.25, "holdout_by": by} for by in ("pictures", "captions")]


@pytest.mark.parametrize("held", HELD)
def test_a_picture_is_trained_with_its_own_caption_or_not_at_all(held, tmp_path):
    whole = load_data(DataConfig(**{**write_world(tmp_path)["data"], **held}), seed=0)
    data = whole.training_pictures()
    kept = sorted({whole.names[int(whole.image_index[pair])] for pair in whole.training_pairs()})
    assert sorted(data.names) == kept and data.training_pairs().numel() == whole.training_pairs().numel()
    pairs = TrainingPairs(data)
    images = torch.arange(data.num_images)
    for choice in (0.0, 0.999):
        chosen = pairs.choose(images, torch.full((len(images),), choice))
        assert torch.equal(data.image_index[chosen], images) and not data.held_out[chosen].any()
    if len(kept) < whole.num_images:
        with pytest.raises(AssertionError, match="without a training caption"):
            TrainingPairs(whole)
    assert data.training_pictures() is data


def test_the_embedded_models_data_is_whole():
    data = load_data(DataConfig(holdout_by="captions"), seed=0)
    assert data.training_pictures() is data


def test_pretraining_with_held_out_pictures_runs(tmp_path):
    data = write_world(tmp_path)["data"]
    seed = next(seed for seed in range(99) if load_data(DataConfig(**data), seed).held_out[-1])  # the last is held out
    parts = {
        part: {**TRAINING, "steps": 2, "batch_size": 12}
        for part in ("autoencoder", "decoder", "diffusion", "evaluator")
    }
    content = {
        **{"job": "pretrain", "name": "small", "seed": seed, "data": data, "milestones": [1]},
        **{"shapes": SHAPES.model_dump(mode="json"), **parts},
        "evaluation": {"num_images": 4, "steps": 1, "batch_size": 2, "num_predictions": 4},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    run = start(tmp_path / "small.yaml", directory=tmp_path / "run")
    assert [row["step"] for row in read_json(run / "curve.json")] == [1, 2]
