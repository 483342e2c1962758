"""What one operation costs, by convention. A layer's file sums these; see `cost.CostModel` for the meanings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs as a function of its width group's kept units n: per_unit·n + if_any·[n > 0] + always."""

    per_unit: int = 0
    if_any: int = 0
    always: int = 0


class ConvLinear:
    """The weights' MACs of convolutions and linear layers, batch 1."""

    output_bias_stays = False  # an emptied layer's output bias costs nothing

    def __init__(self, text_length: int):
        self.text_length = text_length

    def conv(self, conv: nn.Conv2d, positions: int) -> tuple[int, int]:
        """(of the weights, of the bias) of a convolution with `positions` output positions."""
        return conv.weight.numel() * positions, 0

    def linear(self, linear: nn.Linear, positions: int) -> tuple[int, int]:
        """(of the weights, of the bias) of a linear layer on `positions` vectors."""
        return linear.weight.numel() * positions, 0

    def norm(self, norm: nn.GroupNorm | nn.LayerNorm, positions: int) -> int:
        """Of a GroupNorm or LayerNorm on `positions` vectors."""
        return 0

    def silu(self, channels: int, positions: int) -> int:
        """Of a SiLU on `positions` vectors of `channels`."""
        return 0

    def attention(self, inner: int, heads: int, queries: int, keys: int) -> int:
        """Of QKᵀ and AV of `heads` heads of `inner` channels together."""
        return 0

    def emptied(self, bias: nn.Parameter | None) -> int:
        """Of the output bias that an emptied layer still adds."""
        return bias.numel() if self.output_bias_stays and bias is not None else 0


class Exact(ConvLinear):
    """ConvLinear and the products QKᵀ and AV of every attention: torch's FlopCounterMode / 2."""

    def attention(self, inner: int, heads: int, queries: int, keys: int) -> int:  # noqa: D102
        return 2 * queries * keys * inner


class Aptp(ConvLinear):
    """The convention behind APTP's published MACs: text of one token, cross-attention charged as self-attention."""

    def __init__(self, text_length: int):
        super().__init__(text_length=1)

    def conv(self, conv: nn.Conv2d, positions: int) -> tuple[int, int]:  # noqa: D102
        return conv.weight.numel() * positions, 0 if conv.bias is None else conv.bias.numel() * positions

    def linear(self, linear: nn.Linear, positions: int) -> tuple[int, int]:  # noqa: D102
        return linear.weight.numel() * positions, 0 if linear.bias is None else linear.bias.numel()

    def norm(self, norm: nn.GroupNorm | nn.LayerNorm, positions: int) -> int:  # noqa: D102
        if isinstance(norm, nn.GroupNorm):
            return 2 * norm.num_channels * positions
        return norm.normalized_shape[0] * positions

    def silu(self, channels: int, positions: int) -> int:  # noqa: D102
        return 4 * channels * positions

    def attention(self, inner: int, heads: int, queries: int, keys: int) -> int:  # noqa: D102
        return 2 * queries * queries * inner + heads * queries * queries


class Parameters(ConvLinear):
    """The number of parameters, under the same interface."""

    output_bias_stays = True

    def __init__(self):
        super().__init__(text_length=1)

    def conv(self, conv: nn.Conv2d | nn.Linear, positions: int) -> tuple[int, int]:  # noqa: D102
        return conv.weight.numel(), 0 if conv.bias is None else conv.bias.numel()

    linear = conv

    def norm(self, norm: nn.GroupNorm | nn.LayerNorm, positions: int) -> int:  # noqa: D102
        return sum(parameter.numel() for parameter in norm.parameters(recurse=False))


CONVENTIONS = {"exact": Exact, "conv_linear": ConvLinear, "aptp": Aptp}
