"""Settings under which a method runs in about a second."""

SEARCH = {"steps": 3, "batch_size": 4, "learning_rate": 0.05, "log_every": 1}
SMALL: dict[str, dict] = {
    "aptp": {"experts": 2, "warmup": 1, "search": SEARCH},
    "norm": {"samples": 1},
    "obs": {"samples": 2, "batch_size": 2},
    "one_mask": {"experts": 2, "bins": 2, "choice": "norm", "choice_settings": {"samples": 1}},
    "taylor_sp": {"samples": 2, "batch_size": 2, "num_timesteps": 2},
    "timestep_experts": {"bins": 2, "samples": 2, "score": {"samples": 2, "batch_size": 2}},
    "uniarch": {"search": SEARCH},
}
