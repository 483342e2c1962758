"""Attention and feed-forward layers, which diffusers' transformer blocks share: their units and their emptied forms."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import nn

from prunekit.runtime.errors import UserError

from .axes import Axis, Layer
from .emptied import Emptied, EmptiedLayer, spread
from .space import UnitGroup

MOST_GROUPS = 32  # largest number of channel groups in a feed-forward; see `channel_groups`
_ATTENTION = (Axis("to_q", "out"), Axis("to_k", "out"), Axis("to_v", "out"), Axis("to_out.0", "in"))
_ADDED = (Axis("add_q_proj", "out"), Axis("add_k_proj", "out"), Axis("add_v_proj", "out"))
_ADDED_OUTPUT = Axis("to_add_out", "in")
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")  # norms of queries and keys


class EmptiedAttention(Emptied):
    """An attention without heads: the bias of its output projection, and the dropout after it."""

    def __init__(self, attention: Any):
        self.outputs = {"bias": "to_out.0", **self.outputs}
        super().__init__(attention)
        self.dropout = attention.to_out[1]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the bias at every position: (B, q, C) -> (B, q, C); text and masks are ignored."""
        return self.dropout(spread(self.bias, hidden_states))


class EmptiedJointAttention(EmptiedAttention):
    """A joint attention without heads: the bias of each stream's output projection."""

    added_bias: nn.Parameter | None

    def __init__(self, attention: Any):
        has_text_output = getattr(attention, "to_add_out", None) is not None
        self.outputs = {"added_bias": "to_add_out"} if has_text_output else {}
        super().__init__(attention)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each stream's bias at every position: (B, q, C), (B, T, C) -> the same shapes.

        Without an output projection for the text, the text is returned unchanged and not used.
        """
        image, text = super().forward(hidden_states), encoder_hidden_states
        return image, spread(self.added_bias, text) if "added_bias" in self.outputs else text


class EmptiedFeedForward(EmptiedLayer):
    """A feed-forward without inner channels: the bias of its last linear layer."""

    def __init__(self, feedforward: FeedForward):
        super().__init__(feedforward, "net.2")


def attention_layer(
    path: str,
    module: Any,
    queries: str,
    keys: str | None = None,
    added: str | None = None,
    feeds: Sequence[str] = (),
    over_heads: bool = False,
) -> Layer:
    """Describe an attention. Its units are its heads; a zero before an output projection removes a head.

    Args:
        path: path of the attention in the model.
        module: diffusers' `Attention`, or a class with the same names; dense or already cut.
        queries: stream of the hidden states.
        keys: stream of the keys and values; by default the stream of the queries. With `added`, the stream of both
            together.
        added: for a joint attention: the stream of the other hidden states, such as a text's.
        feeds: paths of modules that only feed the attention.
        over_heads: whether the norms of queries and keys are RMS norms over the channels of all heads together, so that
            each head owns channels of the norms; else they run head by head.

    """
    if isinstance(module, Emptied):
        return Layer("attention", path, queries, feeds=tuple(feeds))
    inner, heads = module.to_q.out_features, module.heads
    streams: dict[str, str] = {}
    axes, products = list(_ATTENTION), (queries, keys or queries)
    if added is not None:
        names = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        streams = dict.fromkeys(names, added)
        axes += _ADDED
        if getattr(module, "to_add_out", None) is not None:
            axes.append(_ADDED_OUTPUT)
        products = (products[1], products[1])
    elif keys is not None:
        streams = {"to_k": keys, "to_v": keys}
    norms = [name for name in NORMS if getattr(module, name, None) is not None]
    if over_heads:
        axes += (Axis(name, "each") for name in norms)
        norms = []
    return Layer(
        "attention",
        path,
        queries,
        streams,
        UnitGroup("attention", path, heads, inner // heads),
        tuple(axes),
        products=products,
        feeds=(*feeds, *(f"{path}.{name}" for name in norms)),
    )


def keep_heads(attention: Any, heads: int, channels: int) -> None:
    """Update the widths that an attention stores, after it was cut to `heads` heads of `channels` channels each."""
    attention.heads = heads
    attention.inner_dim = heads * channels
    width = heads * channels
    for name, value in (("sliceable_head_dim", heads), ("inner_kv_dim", width), ("kv_inner_dim", width)):
        if hasattr(attention, name):
            setattr(attention, name, value)


def feedforward_layer(
    path: str,
    module: Any,
    stream: str,
    groups: int | None,
    feeds: Sequence[str] = (),
    inputs: Sequence[str] = ("net.0.proj",),
    output: str = "net.2",
) -> Layer:
    """Describe a feed-forward. Its units are groups of inner channels; a zero before the last layer removes a channel.

    Args:
        path: path of the feed-forward in the model.
        module: diffusers' `FeedForward`, or a class with other names; dense or already cut.
        stream: stream of its input.
        groups: number of groups that an earlier cut kept; None if it was not cut.
        feeds: paths of modules that only feed it.
        inputs: names of the linear layers that read its input. A gated layer may return values and gates together.
        output: name of its last linear layer.

    """
    if isinstance(module, Emptied):
        return Layer("feedforward", path, stream, feeds=tuple(feeds))
    inner = module.get_submodule(output).in_features
    groups = channel_groups(inner) if groups is None else groups
    widths = {name: module.get_submodule(name).out_features for name in inputs}
    return Layer(
        "feedforward",
        path,
        stream,
        group=UnitGroup("feedforward", path, groups, inner // groups),
        axes=(*(Axis(name, "out", copies=width // inner) for name, width in widths.items()), Axis(output, "in")),
        feeds=tuple(feeds),
    )


def check_plain(path: str, layers: Iterable[Any], kinds: Collection[type[nn.Module]]) -> None:
    """Raise UserError if one of a module's layers is of none of these classes, for example if it has an adapter."""
    for layer in layers:
        if type(layer) not in kinds:
            raise UserError(
                f"{path} holds a {type(layer).__name__} where a plain layer is expected; if this is an adapter (LoRA), "
                "merge it into the weights first (fuse_lora, then unload_lora_weights)"
            )


def channel_groups(width: int) -> int:
    """Return the number of groups of neighboring channels in a feed-forward: its width's largest divisor up to 32."""
    return next(count for count in range(min(MOST_GROUPS, width), 0, -1) if width % count == 0)
