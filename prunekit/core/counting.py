"""The cost of single operations, by convention; `cost.CostModel` says what each convention counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from prunekit.runtime.errors import UserError

from .axes import RMS_NORMS

_CONVS = (nn.Conv2d, nn.Conv3d)
_NORMS = (nn.GroupNorm, nn.LayerNorm, *RMS_NORMS)


@dataclass(frozen=True)
class LayerCost:
    """The cost of a layer with n kept units in its width group: per_unit·n + if_any·[n > 0] + always."""

    per_unit: int = 0
    if_any: int = 0
    always: int = 0


class Counter:
    """MACs of the weights of convolutions and linear layers, batch 1: the convention "conv_linear"."""

    output_bias_stays = False  # whether an emptied layer's output bias costs something

    def text_length(self, tokens: int) -> int:
        """Return the number of text tokens to charge for a text of `tokens` tokens."""
        return tokens

    def module(self, module: nn.Module, positions: int) -> tuple[int, int]:
        """Return the costs (weights, bias) of a module on `positions` vectors, without its submodules.

        Raises:
            UserError: the module has parameters, and the cost of its kind is unknown.

        """
        if isinstance(module, _CONVS):
            return self.conv(module, positions)
        if isinstance(module, nn.Linear):
            return self.linear(module, positions)
        if isinstance(module, _NORMS):
            return self.norm(module, positions), 0
        raise UserError(f"the cost of a {type(module).__name__} is unknown, so its MACs cannot be counted")

    def conv(self, conv: nn.Conv2d | nn.Conv3d, positions: int) -> tuple[int, int]:
        """Return the costs (weights, bias) of a convolution with `positions` output positions."""
        return conv.weight.numel() * positions, 0

    def linear(self, linear: nn.Linear, positions: int) -> tuple[int, int]:
        """Return the costs (weights, bias) of a linear layer on `positions` vectors."""
        return linear.weight.numel() * positions, 0

    def norm(self, norm: nn.Module, positions: int) -> int:
        """Return the cost of a norm on `positions` vectors."""
        return 0

    def activation(self, channels: int, positions: int) -> int:
        """Return the cost of an elementwise activation, such as SiLU, on `positions` vectors of `channels`."""
        return 0

    def attention(self, inner: int, heads: int, queries: int, keys: int) -> int:
        """Return the cost of QKᵀ and AV in an attention over `queries` and `keys` positions.

        inner: number of channels of all heads together.
        heads: number of heads.
        """
        return 0

    def emptied(self, bias: nn.Parameter | None) -> int:
        """Return the cost of the output bias that an emptied layer still adds."""
        return bias.numel() if self.output_bias_stays and bias is not None else 0

    def table(self, parameter: nn.Parameter | None) -> int:
        """Return the cost of a parameter that shifts or scales hidden states and enters no matrix product."""
        return 0


class Exact(Counter):
    """MACs like `Counter`, plus the products QKᵀ and AV of every attention: torch's FlopCounterMode / 2."""

    def attention(self, inner: int, heads: int, queries: int, keys: int) -> int:  # noqa: D102
        return 2 * queries * keys * inner


class Parameters(Counter):
    """The number of parameters, with the interface of `Counter`."""

    output_bias_stays = True

    def conv(self, conv: nn.Conv2d | nn.Conv3d | nn.Linear, positions: int) -> tuple[int, int]:  # noqa: D102
        return conv.weight.numel(), 0 if conv.bias is None else conv.bias.numel()

    def linear(self, linear: nn.Linear, positions: int) -> tuple[int, int]:  # noqa: D102
        return self.conv(linear, positions)

    def norm(self, norm: nn.Module, positions: int) -> int:  # noqa: D102
        return sum(parameter.numel() for parameter in norm.parameters(recurse=False))

    def table(self, parameter: nn.Parameter | None) -> int:  # noqa: D102
        return 0 if parameter is None else parameter.numel()


CONVENTIONS: dict[str, type[Counter]] = {"exact": Exact, "conv_linear": Counter}
