"""Ridge regression of a layer's weight and bias, from sums over samples; a batch's inputs are never unfolded.

For a linear layer a sample's inputs are x (d,) and its targets y (o,); for a convolution every output position is a
sample, and x holds the inputs under the kernel. With a constant for the bias, A = Σ w·x xᵀ and B = Σ w·x yᵀ are all
that the fit needs: W = (A + λI)⁻¹ (B + λ W₀) minimizes Σ w·|Wᵀx − y|² + λ|W − W₀|². So W is W₀ for λ → ∞ and the
least-squares solution for λ → 0. The error of W on the samples never exceeds the error of W₀, because W₀ is
a candidate of that minimum with a penalty of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.core.axes import bias_of, weight_of

FREE = 1e-6  # ridge of the bias, as a fraction of the ridge of the weights
SUM_BYTES = 8  # per float64 number


def sums_bytes(weight: Tensor, share: float = 1.0) -> int:
    """Return the bytes of a layer's sums; its weight may be on the meta device.

    share: fraction of its inputs that the layer keeps.
    """
    inputs = round(weight[0].numel() * share) + 1
    return SUM_BYTES * inputs * (inputs + len(weight))


@dataclass
class Sums:
    """A (d + 1, d + 1), B (d + 1, o), Σ w·|y|² and Σ w over samples, in float64; the constant 1 comes last."""

    gram: Tensor
    cross: Tensor
    square: Tensor  # ()
    weight: Tensor  # ()
    has_bias: bool = True

    @classmethod
    def of(cls, layer: nn.Module) -> Sums:
        """Return empty sums for a layer."""
        weight = weight_of(layer)
        size, outputs = weight[0].numel() + 1, len(weight)
        zeros = torch.zeros(size, size + outputs, dtype=torch.float64, device=weight.device)
        parts = (zeros[:, :size].clone(), zeros[:, size:].clone(), zeros.new_zeros(()), zeros.new_zeros(()))
        return cls(*parts, has_bias=bias_of(layer) is not None)

    def add(self, layer: nn.Module, inputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add a batch.

        Args:
            layer: the linear layer or convolution.
            inputs: inputs of the layer, (n, …, d) or (n, c, h, w).
            targets: desired outputs, in the shape of the layer's output.
            weights: weight of each sample of the batch, (n,).

        """
        parts = list(_inputs(layer, inputs))  # functions that return (positions, channels)
        targets = _positions(layer, targets)  # (n·p, o)
        roots = weights.to(targets).sqrt().repeat_interleave(len(targets) // len(weights))[:, None]
        targets = targets * roots
        width = parts[0]().shape[1]
        for row, make_row in enumerate(parts):
            left = make_row() * roots
            rows = slice(row * width, (row + 1) * width)
            for column in range(row, len(parts)):
                right = left if column == row else parts[column]() * roots
                columns = slice(column * width, (column + 1) * width)
                block = (left.T @ right).double()
                if column == row:
                    self.gram[rows, columns] += (block + block.T) / 2  # a float32 product may differ from its transpose
                else:
                    self.gram[rows, columns] += block
                    self.gram[columns, rows] += block.T
            self.cross[rows] += (left.T @ targets).double()
            sums = (left * roots).sum(0).double()
            self.gram[rows, -1] += sums
            self.gram[-1, rows] += sums
        self.gram[-1, -1] += roots.double().square().sum()
        self.cross[-1] += (targets * roots).sum(0).double()
        self.square += targets.double().square().sum()
        self.weight += weights.double().sum().to(self.weight)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are summed over processes."""
        return [self.gram, self.cross, self.square, self.weight]

    def plus(self, other: Sums) -> Sums:
        """Return the sums over the samples of both operands."""
        gram, cross, square, weight = (a + b for a, b in zip(self.tensors(), other.tensors(), strict=True))
        return Sums(gram, cross, square, weight, self.has_bias)

    def error(self, solution: Tensor) -> float:
        """Return the mean squared error Σ w·|Wᵀx − y|² / Σ w of a solution W (d + 1, o)."""
        fitted = (solution * (self.gram @ solution)).sum() - 2 * (solution * self.cross).sum() + self.square
        return float(fitted.clamp(min=0) / self.weight)

    def solve(self, start: Tensor, ridge: float) -> Tensor:
        """Return W (d + 1, o) for a ridge in units of the mean diagonal of A; `start`: W₀."""
        size = len(self.gram) if self.has_bias else len(self.gram) - 1  # without a bias the constant is not fitted
        gram, before = self.gram[:size, :size], start[:size]
        penalty = ridge * self.gram.diagonal()[:-1].mean().clamp(min=1e-12)
        diagonal = torch.full_like(gram.diagonal(), float(penalty))
        if self.has_bias:
            diagonal[-1] = penalty * FREE
        solution = start.clone()
        solution[:size] += torch.linalg.solve(gram + torch.diag(diagonal), self.cross[:size] - gram @ before)
        return solution


def packed(layer: nn.Module) -> Tensor:
    """Return a layer's weight and bias as W (d + 1, o), float64, in the order of the sums."""
    weight = weight_of(layer).detach().double()
    if weight.ndim == 4:
        weight = weight.permute(0, 2, 3, 1)  # (o, kh, kw, c): kernel positions come one after another
    bias = bias_of(layer)
    constant = weight.new_zeros(1, len(weight)) if bias is None else bias.detach().double()[None]
    return torch.cat([weight.reshape(len(weight), -1).T, constant])


@torch.no_grad()
def unpack(layer: nn.Module, solution: Tensor) -> None:
    """Write W (d + 1, o) into a layer; a layer without a bias keeps none, and W's last row must be zero then."""
    weight = weight_of(layer)
    values = solution[:-1].T.to(weight)
    if weight.ndim == 4:
        outputs, channels, height, width = weight.shape
        values = values.reshape(outputs, height, width, channels).permute(0, 3, 1, 2)
    weight.copy_(values.reshape(weight.shape))
    if (bias := bias_of(layer)) is not None:
        bias.copy_(solution[-1].to(weight))


def _positions(layer: nn.Module, outputs: Tensor) -> Tensor:
    """Return outputs as (samples and positions, o)."""
    if isinstance(layer, nn.Conv2d):
        outputs = outputs.movedim(1, -1)
    return outputs.reshape(-1, outputs.shape[-1]).float()


def _inputs(layer: nn.Module, inputs: Tensor) -> Sequence[Callable[[], Tensor]]:
    """Return, for each kernel position, a function that returns the inputs under it, (samples and positions, c)."""
    if not isinstance(layer, nn.Conv2d):
        return [lambda: inputs.reshape(-1, inputs.shape[-1]).float()]
    assert layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    (top, left), (height, width) = layer.padding, layer.kernel_size
    padded = F.pad(inputs, (left, left, top, top))
    (down, right), (dilated, across) = layer.stride, layer.dilation
    rows = (padded.shape[-2] - dilated * (height - 1) - 1) // down + 1
    columns = (padded.shape[-1] - across * (width - 1) - 1) // right + 1

    def under(i: int, j: int) -> Tensor:
        part = padded[:, :, i * dilated :: down, j * across :: right][:, :, :rows, :columns]
        return part.movedim(1, -1).reshape(-1, part.shape[1]).float()

    return [partial(under, i, j) for i in range(height) for j in range(width)]
