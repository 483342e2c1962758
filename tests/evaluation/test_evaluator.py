"""The evaluator: recognition, determinism, files, training, and CLIP as a replacement."""

import pytest
import torch
from small_clip import write_clip
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from prunekit.data.emoji import load_emoji
from prunekit.embedded.evaluator_training import augment, train_evaluator
from prunekit.evaluation.ceiling import evaluator_ceiling, reconstruct, soften, to_bytes
from prunekit.evaluation.clip import CLIPEvaluator
from prunekit.evaluation.evaluator import EVALUATOR_DIRECTORY, Evaluator, EvaluatorConfig
from prunekit.evaluation.features import load_evaluator
from prunekit.evaluation.metrics import cmmd
from prunekit.runtime.randomness import generator
from prunekit.training.trainer import TrainerConfig


@pytest.fixture(scope="module")
def data():
    return load_emoji()


@pytest.fixture(scope="module")
def evaluator():
    return load_evaluator("emoji")


@pytest.fixture(scope="module")
def some(data):
    return data.pixels(range(0, data.num_images, 20), 64)  # (93, 3, 64, 64)


def test_size():
    assert sum(path.stat().st_size for path in EVALUATOR_DIRECTORY.iterdir()) < 6e6


def test_it_recognizes_pictures_and_nothing_in_noise(data, evaluator):
    rows = evaluator_ceiling(evaluator, data)
    assert rows["real"]["top1"] >= 0.99 and rows["real"]["top5"] >= 0.999
    assert rows["half resolution"]["top1"] >= 0.98 and rows["half resolution"]["top5"] >= 0.995
    assert rows["noise"]["top1"] <= 0.005 and rows["noise"]["top5"] <= 0.01
    assert rows["real"]["clip_score"] > rows["noise"]["clip_score"] + 30


def test_a_picture_does_not_depend_on_its_company(evaluator, some):
    together = evaluator.embed_images(some)
    assert together.dtype == torch.float32 and together.shape == (len(some), evaluator.config.embedding)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(some)), atol=1e-5)
    assert torch.equal(together, evaluator.embed_images(some))
    assert torch.equal(together[:5], evaluator.embed_images(some[:5]))
    assert torch.allclose(together.flip(0), evaluator.embed_images(some.flip(0)), atol=1e-5)


def test_distances_see_softness_and_noise(evaluator, some):
    pixels = some.float() / 255
    noisy = pixels + 0.1 * torch.randn(pixels.shape, generator=generator(0, "noise"))
    real, soft, softer, grainy = (
        evaluator.features(images)
        for images in (some, to_bytes(soften(pixels, 2)), to_bytes(soften(pixels, 4)), to_bytes(noisy))
    )
    assert real.shape == (len(some), sum(evaluator.config.widths[1:]))
    assert 0 < cmmd(real, soft) < cmmd(real, softer) and cmmd(real, grainy) > 0.001


def test_texts(evaluator):
    texts = evaluator.embed_texts(["red heart", "qwxyz", "", "red heart"])
    assert torch.isfinite(texts).all() and torch.equal(texts[0], texts[3])
    assert torch.equal(texts[1], texts[2])  # neither text has a known word
    order = evaluator.embed_texts(["family: man, girl", "family: girl, man"])
    assert not torch.allclose(order[0], order[1])


def test_save_and_load_are_exact(evaluator, some, tmp_path):
    evaluator.save_pretrained(tmp_path / "copy")
    copy = load_evaluator(tmp_path / "copy")
    state = copy.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in evaluator.state_dict().items())
    assert torch.equal(copy.embed_images(some[:8]), evaluator.embed_images(some[:8]))
    with pytest.raises(ValueError, match="no evaluator"):
        Evaluator.from_pretrained(tmp_path)


def test_wrong_pictures_are_refused(evaluator, some):
    with pytest.raises(ValueError, match="uint8"):
        evaluator.embed_images(some.float())
    with pytest.raises(ValueError, match="no picture"):
        evaluator.embed_images(some[:0])


def test_training_is_repeatable_and_learns(data, tmp_path):
    shape = EvaluatorConfig(widths=(8, 16, 16, 16), text_width=16, embedding=16)
    config = TrainerConfig(steps=6, batch_size=16, learning_rate=3e-3, log_every=1)
    losses = [[], []]
    for run, rows in enumerate(losses):
        trained = train_evaluator(data, config, tmp_path / str(run), 0, rows.append, shape)
    assert [row["loss"] for row in losses[0]] == [row["loss"] for row in losses[1]]
    assert losses[0][-1]["names"] < losses[0][0]["names"]
    assert not list((tmp_path / "0").glob("checkpoints/*"))
    assert trained.embed_images(data.pixels([0], 64)).shape == (1, 16)


def test_augmentation(some):
    first, again = (augment(some[:16], generator(0, "augment", 3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (16, 3, 64, 64) and first.min() >= 0 and first.max() <= 1
    original = some[:16].float() / 255
    assert 0.01 < F.l1_loss(first, original) < 0.2  # distorted, but still similar


def test_reconstruction(some):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1)
    result = reconstruct(autoencoder, some[:3], batch_size=2)
    assert result.shape == (3, 3, 64, 64) and result.dtype == torch.uint8


def test_clip_in_its_place(some, tmp_path):
    clip = load_evaluator(str(write_clip(tmp_path)))
    assert isinstance(clip, CLIPEvaluator)
    images, texts = clip.embed_images(some[:3]), clip.embed_texts(["dog", "dog cat", "dog", "a" * 40])
    assert images.shape == (3, 8) and torch.allclose(images.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.equal(texts[0], texts[2]) and not torch.allclose(texts[0], texts[1])
    assert torch.allclose(F.normalize(clip.features(some[:3]), dim=1), images)
    tokens = CLIPTokenizer.from_pretrained(tmp_path)(["dog"], return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(tmp_path).get_text_features(**tokens)
    expected = getattr(expected, "pooler_output", expected)
    assert torch.allclose(texts[:1], F.normalize(expected, dim=1), atol=1e-5)
    with pytest.raises(ValueError, match='use "emoji"'):
        load_evaluator(str(tmp_path / "nothing"))
