"""Measuring time and its noise: clock, interleaved timing, latency tables of layers, and a check of MAC counts."""
