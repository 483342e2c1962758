"""Settings with which a method runs in about a second, and the weights of its architectures."""

import torch

SEARCH = {"steps": 3, "batch_size": 4, "learning_rate": 0.05, "log_every": 1}
SMALL: dict[str, dict] = {
    "aptp": {"experts": 2, "warmup": 1, "search": SEARCH},
    "depth": {"samples": 1},
    "norm": {"samples": 1},
    "obs": {"samples": 2, "batch_size": 2},
    "one_mask": {"experts": 2, "bins": 2, "choice": "norm", "choice_settings": {"samples": 1}},
    "taylor_sp": {"samples": 2, "batch_size": 2, "num_timesteps": 2},
    "timestep_experts": {"bins": 2, "samples": 2, "score": {"samples": 2, "batch_size": 2}},
    "uniarch": {"search": SEARCH},
}


def weights_of(result):
    """Return each architecture's weight (N,): its share of prompts times its share of timesteps; the sum is 1."""
    shares = result.info.timestep_shares or [1.0]
    counts = result.info.prompts_per_expert or [1] * (len(result.architectures) // len(shares))
    weights = torch.outer(
        torch.tensor(counts, dtype=torch.float64), torch.tensor(shares, dtype=torch.float64)
    ).flatten()
    return weights / weights.sum()
