"""The terms of APTP's objective that look at the whole batch: contrastive and spread losses, mean cost."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.methods.router import cosine_scores
from prunekit.runtime.errors import UserError


def contrastive_loss(z: Tensor, gates: Tensor, temperature: float = 0.03) -> Tensor:
    """Keep prompts that are alike on architectures that are alike (Eq. 12-14).

    r and s are the row softmaxes of the cosine similarities of the prompt embeddings and of their soft gates, the
    prompt itself included. The loss is the binary cross entropy of s against r, averaged over B^2. Eq. 13 is
    printed without its minus sign; it is a loss only with it.

    Args:
        z: (B, Z) prompt embeddings; no gradient is sent into them.
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
    """Log p and log(1 - p) of the row softmax p (B, B), both to full precision."""
    total = logits.logsumexp(dim=1, keepdim=True)  # (B, 1)
    log_p = logits - total
    # 1 - p cancels only where p > 1/2, which is at most the largest of a row: there, sum the others instead.
    largest = F.one_hot(logits.argmax(dim=1), logits.shape[1]).bool()
    others = logits.masked_fill(largest, -torch.inf).logsumexp(dim=1, keepdim=True) - total
    return log_p, torch.where(largest, others, torch.log1p(-log_p.masked_fill(largest, -1.0).exp()))


def batch_weighted_cost(costs: Tensor, assignment: Tensor) -> Tensor:
    """Mean cost of a batch, sum_i (B_i / B) costs_i, over its experts (the T-hat(A) of Eq. 15).

    Args:
        costs: (N,) the experts' costs, in MACs or in nanoseconds.
        assignment: LongTensor (B,), each prompt's expert.

    """
    counts = counts_of(assignment, len(costs)).to(costs)
    return (costs * counts).sum() / counts.sum()


def counts_of(assignment: Tensor, num_experts: int) -> Tensor:
    """How many prompts each expert has, (N,) int64; as `bincount`, but the host need not wait for the device."""
    return assignment.new_zeros(num_experts).index_add_(0, assignment, torch.ones_like(assignment))


def spread_loss(ratios: Tensor) -> Tensor:
    """Minus the standard deviation of the batch's costs: experts of different sizes lower it.

    In APTP's published code, not in its paper; so is `maximum_loss`. Both take ratios (B,), each sample's share of the
    dense cost. A batch of one has no spread: 0.
    """
    return -ratios.std() if len(ratios) > 1 else ratios.sum() * 0


def maximum_loss(ratios: Tensor) -> Tensor:
    """How much the batch's largest cost lacks to the dense one."""
    return 1 - ratios.max()
