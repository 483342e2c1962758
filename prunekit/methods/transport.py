"""Optimal transport between a batch of prompts and the experts (Eq. 5-7, 20-21 of APTP, ICLR 2025).

Every expert gets an equal share of the batch, and every prompt goes to the expert that fits best under this constraint.
The paper writes Q as (N, B); here Q is (B, N), prompts first, as everywhere else in this package.

Eq. 5 prints the similarity A^T E. Here the similarity is the cosine of e and a, as in Eq. 22; the published code takes
the cosine of hardened gates. With A^T E, epsilon would have to follow the lengths of e and a, which change in training.
"""

import math

import torch
from torch import Tensor

from prunekit.runtime.errors import UserError


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return the transport plan of Eq. 5-7, max_Q Tr(Q^T scores) + epsilon H(Q), by Sinkhorn-Knopp in the log domain.

    Args:
        scores: (B, N), similarity of each prompt to each expert, e.g. `cosine_scores`.
        epsilon: weight of the entropy: near 0 the plan is hard, for large values it is uniform.
        iterations: rounds of scaling the experts' sums, then the prompts'. The paper uses 3.

    Returns:
        Q (B, N), in float32 for scores of float32 or lower precision (float64 stays float64). A prompt's entries sum to
        1/B exactly; an expert's to 1/N up to convergence. It carries no gradient.

    Raises:
        ValueError: scores that are not a (B, N) matrix, or (on a CPU) not finite; epsilon not above 0, or fewer than
            1 iteration.

    """
    if scores.ndim != 2 or 0 in scores.shape:
        raise UserError(f"scores must be (prompts, experts), neither of them 0; got shape {tuple(scores.shape)}")
    if not epsilon > 0 or iterations < 1:
        raise UserError(f"epsilon must be above 0 and iterations at least 1; got {epsilon} and {iterations}")
    if scores.device.type == "cpu" and not scores.isfinite().all():  # elsewhere the host would wait for the device
        raise UserError("scores must be finite; got NaN or infinite entries")
    num_prompts, num_experts = scores.shape
    log_q = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon  # (B, N)
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True) - math.log(num_experts)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True) - math.log(num_prompts)
    return log_q.exp()


def assign(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return the expert of each prompt in training, by optimal transport over the whole batch (Eq. 20-21).

    Args and errors as in `sinkhorn`. Inference uses `Router.route` instead, which routes every prompt by itself.

    Returns:
        LongTensor (B,), each entry in 0..N-1.

    """
    return sinkhorn(scores, epsilon, iterations).argmax(dim=1)


@torch.no_grad()
def expert_potentials(scores: Tensor, epsilon: float = 0.05, iterations: int = 100) -> Tensor:
    """Return a shift of each expert's score with which prompts spread evenly when each takes its best expert.

    The shifts are the experts' dual variables of the transport problem (Eq. 5-7) over a whole data set. `assign`
    balances one batch; with the shifts, prompts that are routed one by one are balanced. The mean shift is 0.

    Args:
        scores: (P, N), finite; their common scale does not matter.
        epsilon: weight of the entropy, in standard deviations of the scores.
        iterations: rounds of scaling the experts' sums, then the prompts'.

    Returns:
        (N,) float64, in the scale of the scores.

    """
    scores = scores.to(torch.float64)
    unit = epsilon * (scores - scores.mean(dim=0)).std().clamp_min(1e-12)
    log_k = scores / unit  # (P, N)
    potentials = torch.zeros(scores.shape[1], dtype=torch.float64)
    for _ in range(iterations):
        log_q = (log_k + potentials).log_softmax(dim=1)
        potentials = potentials - log_q.logsumexp(dim=0) + math.log(len(scores) / scores.shape[1])
    return (potentials - potentials.mean()) * unit
