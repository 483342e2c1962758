"""How a UNet is called."""

from __future__ import annotations


class UNetCalls:
    """What a UNet's calls look like: the part of its description that is about inputs."""
