"""Invalid shapes of the embedded model give one clear error."""

import pytest
import torch
from pydantic import ValidationError

from prunekit.models import emoji_model
from prunekit.models.emoji_model import EmojiModelConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 0, "greater than or equal to 8"),
        ("image_size", 60, "multiple of 8"),
        ("latent_channels", -1, "greater than or equal to 1"),
        ("autoencoder_channels", (8, 8, 8, 0), "greater than or equal to 1"),
        ("unet_channels", (64, -96, 96, 96), "greater than or equal to 1"),
        ("unet_heads", (0, 6, 6, 6), "greater than or equal to 1"),
        ("norm_groups", 0, "greater than or equal to 1"),
        ("text_width", 0, "greater than or equal to 1"),
        ("text_width", 16, "multiple of 32"),
        ("text_layers", 0, "greater than or equal to 1"),
        ("vocabulary", -1, "greater than or equal to 514"),
        ("vocabulary", 10**9, "less than or equal to 65536"),
    ],
)
def test_a_size_out_of_its_bounds_is_one_error(field, value, message):
    with pytest.raises(ValidationError, match=message) as caught:
        EmojiModelConfig(**{field: value})
    (error,) = caught.value.errors()
    assert error["loc"][0] == field


def test_the_smallest_sizes_build_a_model():
    one, eight = (1,) * 4, (8,) * 4
    smallest = EmojiModelConfig(
        image_size=8,
        latent_channels=1,
        autoencoder_channels=eight,
        unet_channels=eight,
        unet_heads=one,
        norm_groups=1,
        text_width=32,
        text_layers=1,
        vocabulary=514,
    )
    tokenizer = emoji_model.build_tokenizer(["red apple"], smallest.vocabulary)
    assert len(tokenizer) == 514
    with torch.device("meta"):
        parts = emoji_model.build_unet(smallest), emoji_model.build_autoencoder(smallest)
        parts = (*parts, emoji_model.build_text_encoder(smallest, tokenizer))
    assert all(sum(parameter.numel() for parameter in part.parameters()) for part in parts)
