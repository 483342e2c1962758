"""All conditions of a transformer are encoded, cached and passed to it: texts, masks, guidance and sizes."""

import pytest
import torch
from small_data import encoded_for
from small_transformer_pipelines import make
from small_transformers import build
from unets import relative_error

from prunekit.core.call import predict
from prunekit.core.registry import denoiser_in, denoiser_of, family_of
from prunekit.data.cache_config import CacheConfig
from prunekit.data.encoded import encode
from prunekit.models import load_pipeline

NEEDED = {
    "sd35": {"text", "pooled"},
    "flux": {"text", "pooled", "guidance"},
    "pixart": {"text", "mask", "sizes"},
    "flux2": {"text", "guidance"},
    "z_image": {"text", "mask"},
    "sana15": {"text", "mask"},
    "wan": {"text"},
    "cogview4": {"text", "sizes"},
}
NEWER = ("flux2", "z_image", "sana15", "wan", "cogview4")


class Letters:
    """A prompt encoder with two numbers per text."""

    def encode(self, texts):
        return torch.tensor([[len(text), text.count("e")] for text in texts], dtype=torch.float32)


@pytest.fixture(scope="module")
def base():
    return load_pipeline("emoji")


CASES = [  # newer pipelines have slow encoders, so only `make test-long` runs all of their cases
    pytest.param(name, config, marks=pytest.mark.long if config and name in NEWER else ())
    for name in NEEDED
    for config in ({}, {"text": False}, {"precision": "float16"})
]


@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_conditions_are_the_familys(name, config, base, tmp_path):
    pipeline = make(name, base)[0]
    model, family = denoiser_in(pipeline), family_of(pipeline)
    images = encoded_for(build("sd35")).images
    data = encode(pipeline, images, Letters(), 16, tmp_path, CacheConfig(**config))
    again = encode(pipeline, images, Letters(), 16, tmp_path, CacheConfig(**config))
    pairs, dropped = torch.tensor([3, 0, 5]), torch.tensor([False, True, False])
    conditions = data.conditions(pairs, dropped=dropped)
    assert set(conditions) == NEEDED[name] and data.key == again.key
    states, null = family.states(pipeline, [images.captions[i] for i in (3, 0, 5)]), family.null_states(pipeline)
    for role, value in states.items():
        expected = torch.stack([null[role][0] if drop else row for row, drop in zip(value, dropped, strict=True)])
        torch.testing.assert_close(conditions[role], expected.float(), rtol=1e-2, atol=1e-2)
        assert torch.equal(again.conditions(pairs, dropped=dropped)[role], conditions[role])
    denoiser = denoiser_of(model)
    noisy = torch.randn(3, *data.latents.shape[1:], generator=torch.Generator().manual_seed(0))
    call = denoiser.call(noisy, torch.tensor([10.0, 500.0, 900.0]), conditions)
    given = {role: value[:1].expand_as(conditions[role]) for role, value in null.items()}
    other = denoiser.call(noisy, torch.tensor([10.0, 500.0, 900.0]), {**conditions, **given})
    with torch.no_grad():
        prediction, untold = predict(model, call), predict(model, other)
    assert prediction.shape == noisy.shape and relative_error(prediction[1], untold[1]) <= 1e-2
    is_told = any(not torch.equal(states[role][0], value[0]) for role, value in null.items())
    assert not is_told or relative_error(prediction[0], untold[0]) > 1e-6, "the text reaches the output"
