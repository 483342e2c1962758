"""Turn an architecture's logits into soft gates while they are learned, and into scores afterwards.

A gate relaxes one Bernoulli variable per unit (Eq. 9 of APTP, ICLR 2025). The paper's noise is Gumbel noise, which is
not symmetric: at logit 0 a gate is open in 63 % of the draws. The noise of a Bernoulli variable is logistic (Maddison
et al., 2017, "The Concrete Distribution"). Hard concrete stretches and clips the gates, so that they reach 0 and 1
(Louizos et al., 2018, "Learning Sparse Neural Networks through L0 Regularization").

Every whole layer has an independent gate, or, as in APTP's published code, all whole layers share one softmax. The
score of a layer is then the running sum of the softmax, from the middle of the UNet outwards, as log odds. So a layer
never has a higher score than a layer further out.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunekit.runtime.tensors import to_device

Noise = Literal["gumbel", "logistic", "hard_concrete"]
DepthGates = Literal["independent", "cumulative"]

STRETCH = (-0.1, 1.1)  # range of hard concrete gates before they are clipped (Louizos et al., Section 4)
CLOSEST = 1e-6  # distance of a running sum to 0 and 1, before its log odds are taken


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return Gumbel(0, 1) noise, float32 of the given shape, on the generator's device."""
    uniform = torch.empty(shape, device=generator.device).exponential_(generator=generator)
    return -uniform.clamp_min(torch.finfo(torch.float32).tiny).log()


def logistic(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return Logistic(0, 1) noise, the difference of two Gumbel draws, float32, on the generator's device."""
    first, second = gumbel((2, *shape), generator)
    return first - second


def gumbel_sigmoid(logits: Tensor, temperature: float, noise: Tensor | float = 0.0) -> Tensor:
    """Return soft gates in [0, 1]: sigmoid((logits + noise) / temperature) (Eq. 9, and Eq. 12 for e').

    Args:
        logits: any shape, e.g. codes (N, D).
        temperature: gamma, 0.4 in the paper.
        noise: drawn with a keyed generator, broadcastable to logits; 0 gives the gates without noise.

    """
    return torch.sigmoid((logits + noise) / temperature)


@dataclass(frozen=True)
class Relaxation:
    """Map from logits (N, D) over a space, widths first, to soft gates (N, D) in [0, 1]."""

    num_width: int  # number of width units, which precede the whole layers
    noise: Noise = "gumbel"
    depth: DepthGates = "independent"
    temperature: float = 0.4
    offset: float = 3.0

    def gates(self, logits: Tensor, source: torch.Generator | None = None) -> Tensor:
        """Return soft gates of logits (N, D), shifted by the offset; `source` draws the noise, None: no noise."""
        scores = self.scores(logits)
        noise: Tensor | float = 0.0
        if source is not None:
            draw = gumbel if self.noise == "gumbel" else logistic
            noise = to_device(draw(tuple(logits.shape), source), logits.device).to(logits.dtype)
        gates = gumbel_sigmoid(scores + self.offset, self.temperature, noise)
        if self.noise == "hard_concrete":
            low, high = STRETCH
            gates = (gates * (high - low) + low).clamp(0, 1)
        return gates

    def scores(self, logits: Tensor) -> Tensor:
        """Return the scores that rank units, (N, D): logits; for a shared softmax, log odds of its running sum."""
        if self.depth == "independent":
            return logits
        inner = logits[:, self.num_width :].to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 rounds to 1
        order = to_device(torch.tensor(drop_order(inner.shape[1])), logits.device)  # of layers, first dropped first
        kept = inner.index_select(1, order).softmax(dim=1).cumsum(dim=1).clamp(CLOSEST, 1 - CLOSEST)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return torch.cat([logits[:, : self.num_width], kept.logit().index_select(1, back)], dim=1)


def drop_order(count: int) -> list[int]:
    """Return layers 0..count-1, numbered in forward order, in the order in which they are dropped, the middle first.

    This is the order of APTP's published code. The layers that stay longest are taken in pairs from the two ends in
    turn, the last layers first: of 14 layers, 13, 12, 0, 1, 11, 10, 2, 3 … stay longest.
    """
    stay, low, high = [], 0, count - 1
    while low <= high:
        for _ in range(2):
            if low <= high:
                stay.append(high)
                high -= 1
        for _ in range(2):
            if low <= high:
                stay.append(low)
                low += 1
    return stay[::-1]
