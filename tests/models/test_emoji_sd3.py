"""The embedded transformer is part of a stock pipeline, whose pictures match their prompts."""

import torch
from diffusers import StableDiffusion3Pipeline

from prunekit.data.config import DataConfig, load_data
from prunekit.evaluation.ceiling import text_figures
from prunekit.evaluation.features import load_evaluator
from prunekit.evaluation.generate import generate
from prunekit.models import EMBEDDED_DIRECTORIES, load_pipeline, load_shape

NAMES = ("red apple", "flag: Japan", "pizza", "cat face", "rocket", "grinning face")


def test_plain_diffusers_opens_and_calls_it():
    pipeline = StableDiffusion3Pipeline.from_pretrained(EMBEDDED_DIRECTORIES["emoji-sd3"], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("red apple", num_inference_steps=2).images
    assert picture.size == (64, 64)


def test_it_draws_the_names():
    data, evaluator = load_data(DataConfig(kind="emoji"), 0), load_evaluator("emoji")
    pictures = generate(load_pipeline("emoji-sd3"), NAMES, range(len(NAMES)), 12, 2.0, len(NAMES))
    targets = torch.tensor([data.names.index(name) for name in NAMES])
    assert text_figures(evaluator, pictures, evaluator.embed_texts(data.names), targets)["top5"] >= 0.8


def test_its_shape_needs_no_weights():
    shape = load_shape("emoji-sd3")
    assert shape.text_length == load_shape("emoji").text_length + 1 and shape.resolution == (64, 64)
