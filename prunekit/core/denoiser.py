"""What the library needs to know of a model class: what every folder of `prunekit.denoisers` implements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from torch import nn

from .axes import Layer, Passage, Place
from .counting import Counter
from .space import UnitGroup


class Structure(Protocol):
    """What a model class is made of, what can be removed from it, and what stands where it was.

    policies: which whole layers may be removed, by name.
    richest: the policy under which every whole layer that can be removed is a unit.
    """

    policies: ClassVar[tuple[str, ...]]
    richest: ClassVar[str]

    def check(self, model: nn.Module) -> None:
        """UserError, in one line, for a model on which the laws have not been verified."""

    def layers(self, model: nn.Module) -> list[Layer]:
        """Every live layer in the order of the forward pass, what contains others before them, "" first.

        Every module with parameters lies in one of them. Removed layers of a pruned model are left out, emptied ones
        are met, without a group.
        """

    def depth_groups(self, model: nn.Module, policy: str) -> list[UnitGroup]:
        """The whole layers that may be removed under a policy."""

    def passage(self, model: nn.Module, group: UnitGroup) -> Passage:
        """Where the hidden states enter and leave what a depth group covers."""

    def lengths(self, model: nn.Module, latent: tuple[int, int], text_length: int) -> dict[str, int]:
        """The number of positions of every stream, for a latent (h, w) and a number of text tokens."""

    def latent_size(self, model: nn.Module) -> tuple[int, int] | None:
        """(h, w) of the latent that the model was made for; None where its config does not say."""

    def after_cut(self, model: nn.Module, layer: Layer, kept: Sequence[int]) -> None:
        """Update what a layer's modules remember of their widths, once its weights are cut to some units."""

    def empty(self, model: nn.Module, layer: Layer) -> None:
        """Replace a layer that loses all its units; what feeds it is replaced by the library."""

    def bypass(self, model: nn.Module, group: UnitGroup) -> None:
        """Replace what a depth group covers by modules that pass the hidden states on; indices stay as they are."""


class Denoiser(Structure, Protocol):
    """One model class, or several alike, described to the library; it holds no state.

    conventions: ways to count MACs, by name, beside those of every model (`counting.CONVENTIONS`).
    latent: name of the forward pass's argument that holds the noisy latent.
    legend: what the letters of `outline` stand for, in words.
    """

    conventions: ClassVar[Mapping[str, type[Counter]]]
    latent: ClassVar[str]
    legend: ClassVar[str]

    def pruned_class(self) -> type[nn.Module]:
        """The class of the pruned models."""

    def outline(self, model: nn.Module) -> dict[str, Place]:
        """The layers of a dense model that a drawing shows, by path, in the order of the forward pass."""

    def blank(self, model: nn.Module) -> nn.Module:
        """A dense model of the same config, without weights: on the meta device."""
