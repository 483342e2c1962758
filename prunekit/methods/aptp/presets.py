"""Presets of APTP's settings, of the paper and of its published code, with their values in earlier versions."""

PAPER = {  # preset="paper": the paper, and its published code where the paper gives no value
    "temperature": 0.4,
    "offset": 3.0,  # published code
    "noise": "gumbel",
    "depth_gates": "independent",  # Eq. 9
    "feature_blocks": "all",
    "feature_scale": "sum",  # Eq. 28
    "distillation_weight": 0.2,
    "resource_weight": 2.0,
    "snr_gamma": 5.0,  # published code
    "snr_form": "published",
    "epsilon": 0.05,
    "sinkhorn_iterations": 3,
    "contrastive_temperature": 0.03,
    "contrastive_weight": 100.0,
    "transport": True,
    "similarity": "cosine",  # Eq. 5, on the logits
    "routing": "cosine",  # Eq. 22
    "codes": "random",  # published code
    "spread_weight": 0.0,  # Eq. 15 has neither
    "maximum_weight": 0.0,
    "balance": False,
    "warmup": 500,
}
PUBLISHED_CODE = PAPER | {  # preset="published_code": the code, also where it differs from the paper
    "depth_gates": "cumulative",
    "feature_scale": "mean",
    "similarity": "hardened",
    "routing": "hardened",
    "spread_weight": 0.1,
    "maximum_weight": 0.1,
}
PRESETS = {"paper": PAPER, "published_code": PUBLISHED_CODE}
PRESET_SEARCH = {"weight_decay": 0.0, "max_grad_norm": None}  # of both presets: published code, the paper names neither
PRESET_MARK = "snr_form"  # a setting recorded with every preset: a record without it is from an earlier version
EARLIER_PAPER = {  # what `preset: paper` was before `published_code` was a preset of its own
    "preset": "default",
    "temperature": 0.4,
    "offset": 3.0,
    "noise": "gumbel",
    "depth_gates": "cumulative",
    "feature_blocks": "all",
    "feature_scale": "mean",
    "distillation_weight": 0.2,
    "resource_weight": 2.0,
    "snr_gamma": 5.0,
    "epsilon": 0.05,
    "sinkhorn_iterations": 3,
    "contrastive_temperature": 0.03,
    "contrastive_weight": 100.0,
    "transport": True,
    "similarity": "hardened",
    "codes": "random",
    "spread_weight": 0.1,
    "maximum_weight": 0.1,
    "balance": False,
    "warmup": 500,
}
