"""Terms of APTP's objective that need the whole batch: contrastive, spread and maximum losses, and the mean cost."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.methods.router import cosine_scores
from prunekit.runtime.errors import UserError


def contrastive_loss(z: Tensor, gates: Tensor, temperature: float = 0.03) -> Tensor:
    """Return the contrastive loss, which gives similar prompts similar architectures (Eq. 12-14).

    r and s are row softmaxes of cosine similarities: r of the prompt embeddings, s of their soft gates. A row includes
    the similarity of a prompt to itself. The loss is the binary cross entropy of s against r, averaged over B^2.
    Eq. 13 is printed without the minus sign that makes it a loss.

    Args:
        z: (B, Z) prompt embeddings, which get no gradient.
        gates: (B, D) e' of Eq. 12, soft gates of the predicted embeddings.
        temperature: tau, 0.03 in the paper.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: fewer than two prompts, or z and gates of different batches.

    """
    if z.ndim != 2 or gates.ndim != 2 or len(z) != len(gates) or len(z) < 2:
        raise UserError(
            "contrastive_loss needs z (B, Z) and gates (B, D) of the same two or more prompts; "
            f"got {tuple(z.shape)} and {tuple(gates.shape)}"
        )
    log_r, log_not_r = _log_softmax(cosine_scores(z.detach(), z.detach()) / temperature)  # (B, B)
    log_s, log_not_s = _log_softmax(cosine_scores(gates, gates) / temperature)  # (B, B)
    return -(log_r.exp() * log_s + log_not_r.exp() * log_not_s).mean()


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p and log(1 - p) of the row softmax p (B, B), both to full precision."""
    total = logits.logsumexp(dim=1, keepdim=True)  # (B, 1)
    log_p = logits - total
    # 1 - p loses precision only where p > 1/2, at most at the largest entry of a row: there, sum the others instead.
    largest = F.one_hot(logits.argmax(dim=1), logits.shape[1]).bool()
    others = logits.masked_fill(largest, -torch.inf).logsumexp(dim=1, keepdim=True) - total
    return log_p, torch.where(largest, others, torch.log1p(-log_p.masked_fill(largest, -1.0).exp()))


def batch_weighted_cost(costs: Tensor, assignment: Tensor) -> Tensor:
    """Return the mean cost of a batch, sum_i (B_i / B) costs_i over the experts (T-hat(A) of Eq. 15).

    Args:
        costs: (N,) the experts' costs, in MACs or in nanoseconds.
        assignment: LongTensor (B,), each prompt's expert.

    """
    counts = counts_of(assignment, len(costs)).to(costs)
    return (costs * counts).sum() / counts.sum()


def counts_of(assignment: Tensor, num_experts: int) -> Tensor:
    """Return the number of prompts per expert, (N,) int64; unlike `bincount`, without waiting for the device."""
    return assignment.new_zeros(num_experts).index_add_(0, assignment, torch.ones_like(assignment))


def spread_loss(ratios: Tensor) -> Tensor:
    """Return minus the standard deviation of the batch's costs; experts of different sizes lower it.

    This loss and `maximum_loss` are in APTP's published code, not in its paper. Both take ratios (B,), the cost of each
    sample as a fraction of the dense cost. A batch of one sample has no spread: 0.
    """
    return -ratios.std() if len(ratios) > 1 else ratios.sum() * 0


def maximum_loss(ratios: Tensor) -> Tensor:
    """Return the gap between the batch's largest cost and the dense cost, as a fraction of the dense cost."""
    return 1 - ratios.max()
