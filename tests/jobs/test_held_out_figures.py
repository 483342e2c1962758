"""Held-out figures use only held-out prompts, reference pictures and agreement samples; also the floors."""

import io

import numpy as np
import pytest
import torch
import yaml
from data_layouts import webdataset
from PIL import Image
from small_model import TRAINING, write_pipeline

from prunekit.evaluation import ceiling, comparison
from prunekit.evaluation.metrics import cmmd, frechet_of_enough, kid
from prunekit.jobs.recipe import load_recipe
from prunekit.jobs.stages import RunLog, Stages

COUNT = 30


def noise(seed):
    blocks = np.random.default_rng(seed).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((16, 16), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Return the stages of a recipe on 30 pictures, four of them duplicated; a third is held out."""
    folder = tmp_path_factory.mktemp("held out")
    samples = [(noise(index % 26), f"caption {index}") for index in range(COUNT)]
    content = {
        "name": "small",
        "model": str(write_pipeline(folder / "model")),
        "data": {**webdataset(folder / "data", samples), "holdout": 0.34},
        "prune": {"budget": 0.7},
        "methods": {"norm": {"samples": 2}},
        "fine_tune": {"steps": 2, **TRAINING},
        "evaluation": {"num_images": 8, "num_seen_images": 6, "num_predictions": 40, "steps": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    recipe = load_recipe(path)
    return Stages(recipe, RunLog.of(recipe, folder / "run"), folder / "run")


@pytest.mark.parametrize("split", ["held out", "training"])
def test_prompts_references_and_agreement_samples_are_of_their_split(stages, split):
    images = stages.data.images
    held = set(images.held_out_pictures().tolist())
    assert 8 <= len(held) <= 11
    allowed = held if split == "held out" else set(range(COUNT)) - held
    bytes_of = {bytes(images.encoded[index]) for index in allowed}
    texts = {images.captions[pair] for pair in range(COUNT) if int(images.image_index[pair]) in allowed}
    prompts = stages.prompts if split == "held out" else stages.seen_prompts
    assert {bytes(picture) for picture in prompts.real_images.encoded} <= bytes_of
    assert set(prompts.prompts) <= texts and len(prompts.prompts) == (8 if split == "held out" else 6)
    for prompt, target in zip(prompts.prompts, prompts.targets.tolist(), strict=True):
        real = prompts.real_images
        assert prompt in [real.captions[pair] for pair in torch.nonzero(real.image_index == target).flatten().tolist()]
    samples, _ = stages.agreement if split == "held out" else stages.seen_agreement
    assert {int(images.image_index[pair]) for pair in samples.indices.tolist()} <= allowed
    assert len(samples.indices) == 40


def test_no_picture_is_in_both_splits(stages):
    held, training = (stages.data.images.of_split(split) for split in ("held out", "training"))
    assert not {bytes(p) for p in held.encoded} & {bytes(p) for p in training.encoded}
    assert not set(held.captions) & set(training.captions)
    assert held.num_images + training.num_images == COUNT


def test_floors_are_of_training_pictures_that_are_no_references(stages, monkeypatch):
    looked = []

    class Looking:
        """An evaluator that records the pictures it gets."""

        def look(self, pictures):
            looked.append({picture.numpy().tobytes() for picture in pictures})
            return stages.evaluator.look(pictures)

    floors = comparison._floors(stages.prompts, stages.data.images, Looking(), stages.resolution, 0)
    size, training = stages.resolution, stages.data.images.of_split("training")
    allowed = {picture.numpy().tobytes() for picture in training.pixels(range(training.num_images), size)}
    assert looked and all(seen <= allowed and len(seen) <= 8 for seen in looked)
    assert floors.keys() == {"cmmd", "kid"} and floors == stages.prompts.floors
    real = training.pixels(_first(training, stages), size)
    features, embeddings = stages.evaluator.look(real)
    if len(looked) == 1:
        assert floors["cmmd"] == pytest.approx(cmmd(stages.prompts.real_embeddings, embeddings))
        assert floors["kid"] == pytest.approx(kid(stages.prompts.real_features, features))


def _first(training, stages):
    from prunekit.runtime.randomness import generator

    order = torch.randperm(training.num_images, generator=generator(0, "floor")).tolist()
    return order[: len(stages.prompts.prompts)]


def test_what_the_evaluator_cannot_judge_is_left_out():
    good, bad = {"clip_score": 60.0, "top1": 0.8, "top5": 0.9}, {"clip_score": 25.0, "top1": 0.5, "top5": 0.2}
    known = {ceiling.REAL: bad, ceiling.REAL_TRAINING: good}
    assert ceiling.unfit(known) == ["clip_score", "top5"] and ceiling.unfit({ceiling.REAL: bad}) == []
    row = {"name": "x", "top1": 0.1, "top5": 0.2, "seen_top5": 0.3, "clip_score": 1.0}
    assert ceiling.fit(row, ["clip_score", "top5"]) == {"name": "x", "top1": 0.1}
    assert "real held-out pictures 20.0 % and real training pictures 90.0 %" in ceiling.unfit_line("top5", known)


def test_a_frechet_distance_of_few_pictures_is_none():
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    assert frechet_of_enough(features, features[:30]) is None
    many = features.repeat(2, 1) + 0.01 * torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    assert frechet_of_enough(many, many) == pytest.approx(0, abs=1e-6)
