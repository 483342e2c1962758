"""Timing: one clock for every device, callables timed side by side, and what a time depends on."""

from prunekit.timing.calls import timed_call, timed_inputs, unet_call, unet_inputs
from prunekit.timing.clock import clock, peak_memory
from prunekit.timing.environment import device_name, environment
from prunekit.timing.interleaved import Measurement, Ratio, Timing, WarmUp, measure, paired_ratio

__all__ = [
    "Measurement",
    "Ratio",
    "Timing",
    "WarmUp",
    "clock",
    "device_name",
    "environment",
    "measure",
    "paired_ratio",
    "peak_memory",
    "timed_call",
    "timed_inputs",
    "unet_call",
    "unet_inputs",
]
