"""The prompt encoder: its size, vectors that depend only on their prompt, and its stated quality."""

import json

import numpy as np
import pytest
import torch

from prunekit.data.emoji import load_emoji
from prunekit.data.prompt_encoder import PROMPT_ENCODER_DIRECTORY, load_prompt_encoder
from prunekit.embedded.make_prompt_encoder import fit, rank_correlation, save, tokens_of, word_of


@pytest.fixture(scope="module")
def encoder():
    return load_prompt_encoder("emoji")


@pytest.fixture(scope="module")
def captions():
    return load_emoji().captions


def test_size_and_figures():
    assert sum(path.stat().st_size for path in PROMPT_ENCODER_DIRECTORY.rglob("*") if path.is_file()) < 1e6
    figures = json.loads((PROMPT_ENCODER_DIRECTORY / "encoder.json").read_text())["rank_correlation"]
    assert figures["seen"] >= 0.85 and figures["names"] >= 0.85 and figures["half"] >= 0.55


def test_every_caption_has_a_direction(encoder, captions):
    vectors = encoder.encode(captions)
    assert vectors.shape == (len(captions), encoder.size) and vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(captions)), atol=1e-5)


def test_batch_invariance(encoder, captions):
    vectors = encoder.encode(captions[:300])
    assert torch.equal(vectors.flip(0), encoder.encode(captions[:300][::-1]))
    for index in range(0, 300, 37):
        assert torch.equal(vectors[index], encoder.encode([captions[index]])[0])


def test_unknown_words(encoder):
    vectors = encoder.encode(["", "qwxyz vbnmk", " ,: ", "qwxyz cat", "cat"])
    assert not vectors[:3].any()
    assert torch.allclose(vectors[3], vectors[4], atol=1e-6)
    assert encoder.encode([]).shape == (0, encoder.size)


def test_tokenizer_splits_as_the_fit_does(encoder, captions):
    tokenizer = encoder.model[0].tokenizer
    for caption in captions[::7]:
        whole = [word for word in tokenizer.encode(caption, add_special_tokens=False).tokens if word[:2] != "##"]
        assert [word_of(word) for word in whole] == [word_of(token) for token in tokens_of(caption)]
    assert tokenizer.encode("Keycap: #", add_special_tokens=False).tokens[-1] == "#"


def test_meaning(encoder):
    query, *others = encoder.encode(["cat", "cat face", "tiger", "flag: Norway", "open mailbox"])
    cosines = [float(query @ other) for other in others]
    assert min(cosines[:2]) > max(cosines[2:])


def test_fit_recovers_a_linear_teacher(tmp_path):
    random = np.random.default_rng(0)
    words = [f"word{i}" for i in range(30)]
    meaning = dict(zip(words, random.normal(size=(30, 100)), strict=True))

    def teach(texts):
        sums = np.stack([sum(meaning[word_of(token)] for token in tokens_of(text)) for text in texts])
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)

    texts = sorted({", ".join(random.choice(words, 3, replace=False)) for _ in range(90)})
    save(tmp_path, *fit(texts, words, set(), teach))
    vectors = load_prompt_encoder(tmp_path).encode(texts).numpy()
    assert rank_correlation(vectors, teach(texts)) > 0.95


def test_rank_correlation():
    vectors = np.random.default_rng(0).normal(size=(40, 6))
    assert rank_correlation(vectors, 3 * vectors) == pytest.approx(1)
    assert abs(rank_correlation(vectors, np.random.default_rng(1).normal(size=(40, 6)))) < 0.2


def test_a_missing_encoder_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot load the prompt encoder"):
        load_prompt_encoder(tmp_path / "nothing")
