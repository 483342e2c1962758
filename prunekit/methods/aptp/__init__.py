"""Adaptive Prompt-Tailored Pruning: N experts and a router (Ganjdanesh et al., ICLR 2025)."""
