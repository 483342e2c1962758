"""Tests that may be skipped in continuous integration, each with its reason; any other skip fails it."""

CUDA = "needs a GPU, which the machines of continuous integration lack"
METRICS = "needs the extra `metrics`, whose packages pull in torchvision; checked where it is installed"

ALLOWED_SKIPS: dict[str, str] = {}
