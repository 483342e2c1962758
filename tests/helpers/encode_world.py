"""Encode a small data set with a small model into a cache: `python encode_world.py WORLD CACHE SETTINGS`.

Tests run this program several times at once, to write one cache. SETTINGS is a recipe's section `cache` in JSON.
"""

import json
import sys
from pathlib import Path

from diffusers import DiffusionPipeline
from small_model import picture, write_pipeline

from prunekit.data.cache_config import CacheConfig
from prunekit.data.config import DataConfig, load_data
from prunekit.data.encoded import EncodedData, encode
from prunekit.data.prompt_encoder import load_prompt_encoder

COUNT = 30
BAD = 7  # this picture cannot be decoded
KEPT = COUNT - 1


def write(folder: Path, layout) -> Path:
    """Write a model and a data set in a layout of tests/helpers/data_layouts.py; return the folder."""
    images = [picture(f"hsl({12 * index}, 90%, 50%)") for index in range(COUNT)]
    images[BAD] = images[BAD][:-30]
    samples = [(image, f"red apple {index}") for index, image in enumerate(images)]
    settings = layout(folder / "data", samples)
    write_pipeline(folder / "model")
    (folder / "data.json").write_text(json.dumps({**settings, "max_bad_share": 0.1}))
    return folder


def encoded(world: Path, cache: Path | None, pipeline=None, data=(), verify=False, **settings) -> EncodedData:
    """Encode the data set at 16 pixels. data: changed settings of the data. settings: settings of the cache."""
    config = DataConfig(**{**json.loads((world / "data.json").read_text()), **dict(data)})
    images = load_data(config, seed=0, cache=cache)
    pipeline = pipeline or DiffusionPipeline.from_pretrained(world / "model")
    return encode(pipeline, images, load_prompt_encoder(), 16, cache, CacheConfig(**settings), verify)


if __name__ == "__main__":
    encoded(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))
