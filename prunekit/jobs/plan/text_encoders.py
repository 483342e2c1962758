"""The sizes of text encoders, by which their weights and multiply-adds are counted; none is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from prunekit.runtime.errors import UserError


class TextEncoderShape(Protocol):
    """What a plan needs of a text encoder."""

    @property
    def params(self) -> int:
        """The number of weights and biases."""
        ...

    @property
    def macs(self) -> int:
        """Multiply-adds of one caption, padded to the full length."""
        ...


@dataclass(frozen=True)
class ClipShape:
    """The sizes of a CLIP text encoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    projection_dim: int = 0  # of a pooled output; 0: none

    @property
    def params(self) -> int:
        """The number of weights and biases."""
        width, inner = self.hidden_size, self.intermediate_size
        layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
        embeddings = (self.vocab_size + self.max_position_embeddings) * width
        return embeddings + self.num_hidden_layers * layer + 2 * width + self.projection_dim * width

    @property
    def macs(self) -> int:
        """Multiply-adds of one caption, padded to the full length."""
        tokens, width = self.max_position_embeddings, self.hidden_size
        layer = tokens * (4 * width * width + 2 * width * self.intermediate_size) + 2 * tokens * tokens * width
        return self.num_hidden_layers * layer + self.projection_dim * width


@dataclass(frozen=True)
class T5Shape:
    """The sizes of a T5 encoder with gated feed-forwards.

    position_tables: layers that have a table of relative positions: T5's first, all of UMT5.
    """

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    d_kv: int = 64
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32
    tokens: int = 512
    position_tables: int = 1

    @property
    def _layer(self) -> int:
        """Weights of a layer's matrices."""
        return 4 * self.d_model * self.num_heads * self.d_kv + 3 * self.d_model * self.d_ff

    @property
    def params(self) -> int:
        """The number of weights."""
        biases = self.position_tables * self.relative_attention_num_buckets * self.num_heads
        norms = (2 * self.num_layers + 1) * self.d_model
        return self.vocab_size * self.d_model + self.num_layers * self._layer + biases + norms

    @property
    def macs(self) -> int:
        """Multiply-adds of one caption, padded to the full length."""
        attention = 2 * self.tokens**2 * self.num_heads * self.d_kv
        return self.num_layers * (self.tokens * self._layer + attention)


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder-only language model with grouped queries, such as Qwen2.5-VL's and Gemma 2.

    others: weights of parts that a text does not go through, which are held in memory all the same.
    head_dim: channels of a head; 0: those of the hidden states over the heads. norms: of a layer. biases: whether
    queries, keys and values have them. tables: of words: one at the input, and one at the output where it is held.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tokens: int = 512
    others: int = 0
    head_dim: int = 0
    norms: int = 2
    biases: bool = True
    tables: int = 2

    @property
    def _widths(self) -> tuple[int, int]:
        """Channels of the queries, and of the keys."""
        channels = self.head_dim or self.hidden_size // self.num_attention_heads
        return channels * self.num_attention_heads, channels * self.num_key_value_heads

    @property
    def _layer(self) -> int:
        """Weights of a layer's matrices."""
        return 2 * self.hidden_size * sum(self._widths) + 3 * self.hidden_size * self.intermediate_size

    @property
    def params(self) -> int:
        """The number of weights and biases."""
        queries, keys = self._widths
        small = self.norms * self.hidden_size + self.biases * (queries + 2 * keys)
        embeddings = self.tables * self.vocab_size * self.hidden_size
        return embeddings + self.num_hidden_layers * (self._layer + small) + self.hidden_size + self.others

    @property
    def macs(self) -> int:
        """Multiply-adds of one caption, padded to the full length; the words' scores are not computed."""
        queries, _ = self._widths
        return self.num_hidden_layers * (self.tokens * self._layer + 2 * self.tokens**2 * queries)


SANA_TOKENS = 298 + 206  # a prompt's, and about those of the instruction before it: its words, signs and a start
GEMMA_2: dict[str, Any] = {"norms": 4, "biases": False, "tables": 1}
CLIP_L = ClipShape(768, 3072, 12)
OPEN_CLIP_H = ClipShape(1024, 4096, 23)
OPEN_CLIP_G = ClipShape(1280, 5120, 32, projection_dim=1280)
CLIP_L_PROJECTED = ClipShape(768, 3072, 12, projection_dim=768)
T5_XXL = T5Shape(4096, 10240, 24, 64)
UMT5_XXL = T5Shape(4096, 10240, 24, 64, vocab_size=256384, position_tables=24)
GEMMA_2_2B = DecoderShape(2304, 9216, 26, 8, 4, 256000, SANA_TOKENS, head_dim=256, **GEMMA_2)
QWEN_2_5_VL_7B = DecoderShape(3584, 18944, 28, 28, 4, 152064, others=676_550_144)  # its vision tower's


def shape_of(config: Mapping[str, Any], tokens: int) -> TextEncoderShape:
    """Return the sizes that a text encoder's config states.

    tokens: of a text, where the config does not say.

    Raises:
        UserError: a class that is not known.

    """
    known: dict[str, Any] = {
        "clip_text_model": ClipShape,
        "t5": T5Shape,
        "umt5": T5Shape,
        "gemma2": DecoderShape,
    }
    kind = config.get("model_type", "clip_text_model")
    if kind not in known:
        raise UserError(f"a text encoder of model_type {kind!r} is not known")
    names = known[kind].__dataclass_fields__.keys() - {"projection_dim", "tokens"}
    sizes = {name: value for name, value in config.items() if name in names}
    if kind == "t5":
        return T5Shape(**sizes, tokens=tokens)
    if kind == "umt5":
        return T5Shape(**sizes, position_tables=sizes["num_layers"])
    if kind == "gemma2":
        return DecoderShape(**sizes, **GEMMA_2, tokens=SANA_TOKENS)
    projected = any(name.endswith("WithProjection") for name in config.get("architectures") or ())
    return ClipShape(**sizes, projection_dim=config["projection_dim"] if projected else 0)
