"""What the library needs to know of a model class: what every folder of `prunekit.denoisers` implements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from .axes import Layer, Passage, Place
from .call import Call, Fill
from .counting import Counter
from .family import Family
from .modulation import Modulation
from .space import UnitGroup


class Structure(Protocol):
    """What a model class is made of, what can be removed from it, and what stands where it was.

    policies: which whole layers may be removed, by name.
    richest: the policy under which every whole layer that can be removed is a unit.
    tables: paths of modules with tensors that are no parameters, such as positions; a copy takes them over.
    modulation: where the layers lie that can be folded; None where there are none, or where they hold little.
    """

    policies: ClassVar[tuple[str, ...]]
    richest: ClassVar[str]
    tables: ClassVar[tuple[str, ...]]
    modulation: ClassVar[Modulation | None]

    def check(self, model: nn.Module) -> None:
        """UserError, in one line, for a model on which the laws have not been verified."""

    def layers(self, model: nn.Module) -> list[Layer]:
        """Every live layer in the order of the forward pass, what contains others before them, "" first.

        Every module with parameters lies in one of them. Removed layers of a pruned model are left out, emptied ones
        are met, without a group.
        """

    def groups(self, model: nn.Module, policy: str) -> list[UnitGroup]:
        """The groups of all layers, in their order, then the whole layers that may be removed under a policy."""

    def passage(self, model: nn.Module, group: UnitGroup) -> Passage:
        """Where the hidden states enter and leave what a depth group covers."""

    def lengths(self, model: nn.Module, latent: tuple[int, int], text_length: int) -> dict[str, int]:
        """The number of positions of every stream, for a latent (h, w) and a number of text tokens."""

    def after_cut(self, model: nn.Module, layer: Layer, kept: Sequence[int]) -> None:
        """Update what a layer's modules remember of their widths, once its weights are cut to some units."""

    def empty(self, model: nn.Module, layer: Layer) -> None:
        """Replace a layer that loses all its units; what feeds it is replaced by the library."""

    def bypass(self, model: nn.Module, group: UnitGroup) -> None:
        """Replace what a depth group covers by modules that pass the hidden states on; indices stay as they are."""


class Denoiser(Structure, Protocol):
    """One model class, or several alike, described to the library; it holds no state.

    family: what pipelines do around such a model.
    conventions: ways to count MACs, by name, beside those of every model (`counting.CONVENTIONS`).
    legend: what the letters of `outline` stand for, in words.
    """

    family: ClassVar[Family]
    conventions: ClassVar[Mapping[str, type[Counter]]]
    legend: ClassVar[str]

    @property
    def latent(self) -> str:
        """Name of the forward pass's argument that holds the noisy latent."""
        ...

    @property
    def timestep(self) -> str:
        """Name of the forward pass's argument that holds the timestep."""
        ...

    def taken(self, timesteps: Tensor) -> Tensor:
        """Return timesteps of the noise process as the model takes them, such as divided by their number."""
        ...

    def pruned_class(self) -> type[nn.Module]:
        """The class of the pruned models."""

    def class_source(self) -> tuple[list[tuple[str, str]], str]:
        """What a file that defines the class by itself is made of: (module, name) of definitions, and a last statement.

        The statement makes the class of the definitions; it is empty where one of them is the class.
        """

    def stock(self, model: nn.Module) -> nn.Module | None:
        """A pruned model in a stock class, with the same function and a copy of the weights; None if there is none.

        A dense model is its own stock form.
        """

    def outline(self, model: nn.Module) -> dict[str, Place]:
        """The layers of a dense model that a drawing shows, by path, in the order of the forward pass."""

    def blank(self, model: nn.Module) -> nn.Module:
        """A dense model of the same config, without weights: on the meta device."""

    def from_config(self, config: Mapping[str, Any], name: str | Path) -> nn.Module:
        """Build a model, stock or pruned, on the meta device and in evaluation mode.

        Args:
            config: its config.json.
            name: what errors call it.

        Raises:
            UserError: a config that builds no such model, or one that the library cannot prune.

        """
        ...

    def fill_tables(self, model: nn.Module) -> None:
        """Give a model that was built on the meta device the tables that its constructor computes."""

    def check_config(self, config: Mapping[str, Any], name: str | Path) -> None:
        """Raise UserError for a config whose sizes are none, or so large that building its model would not end."""
        ...

    # calls

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call that predicts for noisy latents, under the names that the model gives its arguments.

        Args:
            noisy: (B, C, h, w).
            timesteps: (B,), or () for all samples; in the unit of the family's noise process.
            conditions: what `EncodedData.conditions` returns. By role: "text" (B, T, E), the states of the texts; and
                where the model takes them "pooled" (B, P), the texts' pooled embeddings, and "sizes" (B, 6), the
                original height and width in pixels, the crop's top and left, and the target's height and width.

        """
        ...

    def example(
        self,
        model: nn.Module,
        batch: int,
        latent: tuple[int, int],
        text_length: int,
        fill: Fill,
        timesteps: Tensor | None = None,
    ) -> Call:
        """Return a call of the right shapes.

        Args:
            model: whose config gives the channels and widths; it may be on the meta device.
            batch: samples B.
            latent: (h, w).
            text_length: tokens T of the text.
            fill: makes the values. It is requested "noisy" (B, C, h, w) first, then for the conditions by role, as
                `call` lists them.
            timesteps: (B,) or (); by default one in the middle of the schedule, for all samples.

        """
        ...

    def at(self, call: Call, noisy: Tensor, timesteps: Tensor) -> Call:
        """Return the call under the same conditions for other noisy latents (B, C, h, w) at other timesteps (B,)."""
        ...

    def noisy(self, call: Call) -> Tensor:
        """Return the noisy latents of a call, (B, C, h, w)."""
        ...

    def starting(self, call: Call) -> Tensor:
        """Return the noisy latents of a call in the form in which a pipeline takes those that it starts from."""
        ...

    def text_length(self, call: Call) -> int:
        """Return the tokens of a call's text."""
        ...

    # shapes, from a model's config

    def latent_channels(self, model: nn.Module) -> int:
        """Return C, the channels of the latents."""
        ...

    def latent_size(self, model: nn.Module) -> tuple[int, int] | None:
        """(h, w) of the latent that the model was made for; None if its config does not say."""

    def text_width(self, model: nn.Module) -> int:
        """Return E, the width of the text states."""
        ...

    def pooled_width(self, model: nn.Module) -> int:
        """Return P, the width of the pooled text embedding; 0 where the model takes none."""
        ...

    # parts

    def blocks(self, model: nn.Module, inner: bool = True) -> dict[str, nn.Module]:
        """Return the blocks whose outputs are distilled, by path, in the order of a forward pass.

        inner: with the block in the middle, where the model has one (a UNet's mid block).
        """
        ...

    def hidden(self, output: Any) -> Tensor:
        """Return the hidden states in the output of one of these blocks."""
        ...

    def regions(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules that are compiled, each by itself."""
        ...
