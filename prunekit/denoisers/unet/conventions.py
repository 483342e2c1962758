"""The counting convention behind the MACs in the APTP paper."""

from __future__ import annotations

from torch import nn

from prunekit.core.counting import Counter


class Aptp(Counter):
    """The convention behind APTP's published MACs: text of one token, cross-attention charged as self-attention."""

    def text_length(self, tokens: int) -> int:  # noqa: D102
        return 1

    def conv(self, conv: nn.Conv2d | nn.Conv3d, positions: int) -> tuple[int, int]:  # noqa: D102
        return conv.weight.numel() * positions, 0 if conv.bias is None else conv.bias.numel() * positions

    def linear(self, linear: nn.Linear, positions: int) -> tuple[int, int]:  # noqa: D102
        return linear.weight.numel() * positions, 0 if linear.bias is None else linear.bias.numel()

    def norm(self, norm: nn.Module, positions: int) -> int:  # noqa: D102
        if isinstance(norm, nn.GroupNorm):
            return 2 * norm.num_channels * positions
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        return norm.normalized_shape[0] * positions

    def activation(self, channels: int, positions: int) -> int:  # noqa: D102
        return 4 * channels * positions

    def attention(self, inner: int, heads: int, queries: int, keys: int) -> int:  # noqa: D102
        return 2 * queries * queries * inner + heads * queries * queries
