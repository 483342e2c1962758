"""A very small Stable Diffusion pipeline in a folder (real tokenizer, random weights), and a small data set."""

import io
import json
import tarfile
from pathlib import Path

import torch
import yaml
from diffusers import UNet2DConditionModel
from PIL import Image

from prunekit.models import emoji_model

SHAPES = emoji_model.EmojiModelConfig(
    latent_channels=4,
    autoencoder_channels=(8, 8, 8, 8),
    unet_channels=(16, 32, 32, 32),
    unet_heads=(2, 2, 2, 2),
    norm_groups=8,
    text_width=32,
    text_layers=1,
    vocabulary=600,
)
CAPTIONS = [f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("apple", "ball", "cube", "star")]


def write_pipeline(folder: Path, layers: int = 2) -> Path:
    """Write the pipeline to `folder`; its weights are the same in every call.

    layers: layers per block; Stable Diffusion has 2.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        tokenizer = emoji_model.build_tokenizer(CAPTIONS, SHAPES.vocabulary)
        unet = emoji_model.build_unet(SHAPES)
        if layers != unet.config.layers_per_block:
            unet = UNet2DConditionModel.from_config(unet.config, layers_per_block=layers)
        text_encoder = emoji_model.build_text_encoder(SHAPES, tokenizer)
        pipeline = emoji_model.assemble(emoji_model.build_autoencoder(SHAPES), text_encoder, tokenizer, unet)
    pipeline.save_pretrained(folder)
    return folder


RECIPE = {
    "name": "small",
    "data": {"kind": "webdataset", "path": "shards"},
    "prune": {"budget": 0.7},
    "methods": {"norm": {}},
    "fine_tune": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3},
    "evaluation": {"num_images": 4, "steps": 2, "guidance": 3.0},
}


def write_recipe(path: Path, model: Path, **changes) -> Path:
    """Write a recipe that prunes `model` by Norm."""
    path.write_text(yaml.safe_dump({**RECIPE, "model": str(model), **changes}))
    return path


def write_shard(path: Path, samples: list[tuple[bytes, str]]) -> Path:
    """Write (picture, caption) samples as one WebDataset shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for index, (picture, caption) in enumerate(samples):
            for suffix, content in (("png", picture), ("txt", caption.encode()), ("json", json.dumps({}).encode())):
                entry = tarfile.TarInfo(f"{index:04d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


TRAINING = {"batch_size": 4, "learning_rate": 1e-2}
COLORS = ("red", "green", "blue", "yellow")


def write_world(folder: Path, layers: int = 1) -> dict:
    """Write the pipeline and a data set of 12 pictures; return a recipe's settings with their paths."""
    samples = [(picture(COLORS[i % 4]), f"{caption} number {i}") for i, caption in enumerate(CAPTIONS)]
    write_shard(folder / "shards" / "0.tar", samples)
    data = {"kind": "webdataset", "path": str(folder / "shards"), "holdout": 0.25}
    return {"name": "small", "model": str(write_pipeline(folder / "model", layers)), "data": data}


def picture(color: str = "red") -> bytes:
    """Return a picture of one color as PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(buffer, "png")
    return buffer.getvalue()
