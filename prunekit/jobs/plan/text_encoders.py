"""Sizes of text encoders, from which parameters and MACs are counted without building the models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from prunekit.runtime.errors import UserError


class TextEncoderShape(Protocol):
    """The counts of a text encoder that a plan needs."""

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
    projection_dim: int = 0  # width of the projected pooled output; 0: no projection

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

    position_tables: number of layers with a table of relative positions: 1 in T5, all in UMT5.
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

    head_dim: channels per head; 0: the hidden size divided by the number of heads.
    has_biases: whether queries, keys and values have biases.
    has_head_norms: whether queries and keys are normalized per head.
    is_tied: whether the model holds no output matrix in addition to the token embeddings.
    has_scores: whether encoding a caption also computes token logits.
    norms: number of norms of the hidden states per layer.
    others: number of weights in parts that texts do not pass but that are in memory, such as a vision tower.
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
    has_biases: bool = True
    has_head_norms: bool = False
    is_tied: bool = False
    has_scores: bool = False

    @property
    def _widths(self) -> tuple[int, int]:
        """Channels of the queries, and of the keys."""
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        return head * self.num_attention_heads, head * self.num_key_value_heads

    @property
    def _layer(self) -> int:
        """Weights of a layer's matrices."""
        return 2 * self.hidden_size * sum(self._widths) + 3 * self.hidden_size * self.intermediate_size

    @property
    def params(self) -> int:
        """The number of weights and biases."""
        queries, keys = self._widths
        small = self.norms * self.hidden_size
        small += queries + 2 * keys if self.has_biases else 0
        small += 2 * queries // self.num_attention_heads if self.has_head_norms else 0
        embeddings = (1 if self.is_tied else 2) * self.vocab_size * self.hidden_size  # input and output matrix
        return embeddings + self.num_hidden_layers * (self._layer + small) + self.hidden_size + self.others

    @property
    def macs(self) -> int:
        """Multiply-adds of one caption, padded to the full length."""
        layer = self.tokens * self._layer + 2 * self.tokens**2 * self._widths[0]
        scores = self.tokens * self.vocab_size * self.hidden_size if self.has_scores else 0
        return self.num_hidden_layers * layer + scores


SANA_TOKENS = 298 + 206  # tokens of a prompt, and about those of the instruction before it (with the start token)
GLM_TOKENS = 224  # tokens per text in CogView4
GEMMA_2: dict[str, Any] = {"norms": 4, "has_biases": False, "is_tied": True}
CLIP_L = ClipShape(768, 3072, 12)
OPEN_CLIP_H = ClipShape(1024, 4096, 23)
OPEN_CLIP_G = ClipShape(1280, 5120, 32, projection_dim=1280)
CLIP_L_PROJECTED = ClipShape(768, 3072, 12, projection_dim=768)
T5_XXL = T5Shape(4096, 10240, 24, 64)
QWEN_3_4B = DecoderShape(
    2560, 9728, 36, 32, 8, 151936, head_dim=128, has_biases=False, has_head_norms=True, is_tied=True
)
QWEN_3_8B = replace(QWEN_3_4B, hidden_size=4096, intermediate_size=12288, is_tied=False)
MISTRAL_SMALL_24B = DecoderShape(
    5120, 32768, 40, 32, 8, 131072, head_dim=128, has_biases=False, has_scores=True, others=438_958_080
)  # others: its vision tower, and the layers between the tower and the language model
UMT5_XXL = T5Shape(4096, 10240, 24, 64, vocab_size=256384, position_tables=24)
GEMMA_2_2B = DecoderShape(2304, 9216, 26, 8, 4, 256000, SANA_TOKENS, head_dim=256, **GEMMA_2)
QWEN_2_5_VL_7B = DecoderShape(3584, 18944, 28, 28, 4, 152064, others=676_550_144)  # others: its vision tower


def shape_of(config: Mapping[str, Any], tokens: int) -> TextEncoderShape:
    """Return the sizes that a text encoder's config states.

    tokens: number of tokens per text for a T5 encoder, whose config does not state it.

    Raises:
        UserError: the config has an unknown model_type.

    """
    kind = config.get("model_type", "clip_text_model")
    if kind == "mistral3":  # its vision tower is assumed to be that of the known model
        return _decoder(config["text_config"], has_scores=True, others=MISTRAL_SMALL_24B.others)
    if kind == "qwen3":
        scores = "Qwen3ForCausalLM" in (config.get("architectures") or ())
        return _decoder(config, has_scores=scores, has_head_norms=True)
    if kind == "glm":
        decoder = _decoder(config, has_scores=False)
        return replace(decoder, has_biases=bool(config.get("attention_bias")), tokens=GLM_TOKENS)
    known: dict[str, Any] = {"clip_text_model": ClipShape, "t5": T5Shape, "umt5": T5Shape, "gemma2": DecoderShape}
    if kind not in known:
        raise UserError(f"a text encoder of model_type {kind!r} is not known")
    sizes = _sizes(known[kind], config, {"projection_dim", "tokens"})
    if kind == "t5":
        return T5Shape(**sizes, tokens=tokens)
    if kind == "umt5":
        return T5Shape(**sizes, position_tables=sizes["num_layers"])
    if kind == "gemma2":
        return DecoderShape(**sizes, **GEMMA_2, tokens=SANA_TOKENS)
    projected = any(name.endswith("WithProjection") for name in config.get("architectures") or ())
    return ClipShape(**sizes, projection_dim=config["projection_dim"] if projected else 0)


def _decoder(config: Mapping[str, Any], **more: Any) -> DecoderShape:
    """Return the sizes of a language model without biases, for texts of the default length.

    more: further fields of DecoderShape. A model without has_scores holds no output matrix.
    """
    tied = bool(config.get("tie_word_embeddings")) or not more["has_scores"]
    return DecoderShape(**_sizes(DecoderShape, config), has_biases=False, is_tied=tied, **more)


def _sizes(kind: Any, config: Mapping[str, Any], left_out: Collection[str] = ()) -> dict[str, Any]:
    """Return the values that a config states for the fields of a dataclass, except those in `left_out`."""
    names = kind.__dataclass_fields__.keys() - set(left_out)
    return {name: value for name, value in config.items() if name in names}
