"""What the library needs to know of a model class: the protocol that every folder of `prunekit.denoisers` implements."""

from __future__ import annotations

from typing import Protocol


class Denoiser(Protocol):
    """One model class, or several alike, described to the library; it holds no state."""
