"""How much a training takes at once, and the same training made small: for smoke tests, for checks and for plans."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from prunekit.training.trainer import TrainerConfig

C = TypeVar("C", bound=TrainerConfig)
SMOKE = {"steps": 2, "batch_size": 4, "micro_batch": 2, "warmup_steps": 1, "checkpoint_steps": 2}  # at most
STEPS = 2  # of a training that is only tried: the first also warms up, so that the second is the one that counts


def is_number(value: Any) -> bool:
    """Whether a setting is a number, which a boolean is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def capped(settings: Mapping[str, Any], most: Mapping[str, int]) -> dict[str, Any]:
    """Return settings with no number above its entry in `most`."""
    lower = {key: min(value, most[key]) for key, value in settings.items() if key in most and is_number(value)}
    return {**settings, **lower}


def samples_at_once(config: TrainerConfig, devices: int) -> int:
    """Return the samples of one forward pass on one of the devices that share a batch."""
    per_device = math.ceil(config.batch_size / devices)
    return min(config.micro_batch or per_device, per_device)


def two_steps(config: C, devices: int) -> C:
    """Return a training of two steps, with as many samples at once as one of the devices has."""
    changes = {"steps": STEPS, "warmup_steps": 0, "decay_share": 0.0, "log_every": 1}
    return config.model_copy(update={**changes, "micro_batch": samples_at_once(config, devices)})
