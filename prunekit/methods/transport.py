"""Optimal transport between a batch of prompts and the experts (Eq. 5-7, 20-21 of APTP, ICLR 2025).

Every expert gets an equal share of the batch, and every prompt goes where it fits best under that constraint.
The paper writes Q as (N, B); here prompts come first, Q is (B, N), as everywhere else in this package.

Eq. 5 prints the similarity A^T E. Here it is the cosine of e and a, as in Eq. 22; the published code takes a cosine
too, of hardened gates. The lengths of e and a change while they are trained, and epsilon would have to follow them.
"""

import math

import torch
from torch import Tensor

from prunekit.runtime.errors import UserError


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Transport plan of Eq. 5-7: max_Q Tr(Q^T scores) + epsilon H(Q), by Sinkhorn-Knopp in the log domain.

    Args:
        scores: (B, N), how well each prompt fits each expert, e.g. `cosine_scores`.
        epsilon: weight of the entropy: near 0 the plan is hard, large it is uniform.
        iterations: rounds of scaling the experts' sums, then the prompts'. The paper uses 3.

    Returns:
        Q (B, N), in float32 whatever lower precision came in (float64 stays float64). A prompt's entries sum to
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
    """Expert of each prompt in training, by optimal transport over the whole batch (Eq. 20-21).

    Args and errors as in `sinkhorn`. Inference takes `Router.route` instead, which looks at one prompt at a time.

    Returns:
        LongTensor (B,), each entry in 0..N-1.

    """
    return sinkhorn(scores, epsilon, iterations).argmax(dim=1)


@torch.no_grad()
def expert_potentials(scores: Tensor, epsilon: float = 0.05, iterations: int = 100) -> Tensor:
    """What to add to each expert's score so that prompts spread evenly when each takes its best expert.

    These are the experts' dual variables of the transport problem (Eq. 5-7) over a whole data set: where `assign`
    balances one batch, they balance any prompt by itself. Their mean is 0.

    Args:
        scores: (P, N), finite; their common scale does not matter.
        epsilon: weight of the entropy, in standard deviations of the scores.
        iterations: rounds of scaling the experts' sums, then the prompts'.

    Returns:
        (N,) float64, in the scores' own scale.

    """
    scores = scores.to(torch.float64)
    unit = epsilon * (scores - scores.mean(dim=0)).std().clamp_min(1e-12)
    log_k = scores / unit  # (P, N)
    potentials = torch.zeros(scores.shape[1], dtype=torch.float64)
    for _ in range(iterations):
        log_q = (log_k + potentials).log_softmax(dim=1)
        potentials = potentials - log_q.logsumexp(dim=0) + math.log(len(scores) / scores.shape[1])
    return (potentials - potentials.mean()) * unit
