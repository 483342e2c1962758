"""The protocol that describes a model class to the library; every folder of `prunekit.denoisers` implements it."""

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
    """The layers of a model class, the units that can be removed from them, and what replaces a removed layer.

    policies: names of the depth policies; each selects the whole layers that may be removed.
    richest: the policy under which every whole layer that can be removed is a unit.
    tables: paths of modules with tensors that are not parameters, such as positions; a copied model takes these tensors
        over.
    modulation: location of the modulation layers that can be folded; None if there are none, or if they hold few
        weights.
    """

    policies: ClassVar[tuple[str, ...]]
    richest: ClassVar[str]
    tables: ClassVar[tuple[str, ...]]
    modulation: ClassVar[Modulation | None]

    def check(self, model: nn.Module) -> None:
        """Raise UserError, in one line, for a model on which the laws have not been verified."""

    def layers(self, model: nn.Module) -> list[Layer]:
        """Return every live layer in the order of the forward pass: "" first, and a layer before the layers inside it.

        Every module with parameters lies in one of these layers. Layers removed from a pruned model are left out;
        emptied layers are included, without a group.
        """

    def groups(self, model: nn.Module, policy: str) -> list[UnitGroup]:
        """Return the groups of all layers, in order, then the whole layers that may be removed under a policy."""

    def passage(self, model: nn.Module, group: UnitGroup) -> Passage:
        """Return where the hidden states enter and leave the modules that a depth group covers."""

    def lengths(self, model: nn.Module, latent: tuple[int, int], text_length: int) -> dict[str, int]:
        """Return the number of positions of every stream, for a latent (h, w) and a number of text tokens."""

    def after_cut(self, model: nn.Module, layer: Layer, kept: Sequence[int]) -> None:
        """Update the widths that a layer's modules store, after its weights were cut to the kept units."""

    def empty(self, model: nn.Module, layer: Layer) -> None:
        """Replace a layer that loses all its units; the library itself replaces the modules that feed the layer."""

    def bypass(self, model: nn.Module, group: UnitGroup) -> None:
        """Replace the modules that a depth group covers by ones that pass hidden states on; indices do not change."""


class Denoiser(Structure, Protocol):
    """The description of one model class, or of several similar ones; it holds no state.

    family: what pipelines do around such a model.
    conventions: additional ways to count MACs, by name; `counting.CONVENTIONS` holds those for all models.
    legend: meaning of the letters in `outline`, in words.
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
        """Return timesteps of the noise process in the model's unit, for example divided by their number."""
        ...

    def pruned_class(self) -> type[nn.Module]:
        """Return the class of the pruned models."""

    def class_source(self) -> tuple[list[tuple[str, str]], str]:
        """Return the content of a standalone file of the pruned class: (module, name) of definitions, last statement.

        The statement makes the class from the definitions; it is empty if one of the definitions is the class.
        """

    def stock(self, model: nn.Module) -> nn.Module | None:
        """Return a pruned model in a stock class, with the same function and copied weights; None if no class fits.

        A dense model is its own stock form.
        """

    def outline(self, model: nn.Module) -> dict[str, Place]:
        """Return the layers of a dense model that a diagram shows, by path, in the order of the forward pass."""

    def blank(self, model: nn.Module) -> nn.Module:
        """Return a dense model of the same config, without weights: on the meta device."""

    def from_config(self, config: Mapping[str, Any], name: str | Path) -> nn.Module:
        """Build a model, stock or pruned, on the meta device and in evaluation mode.

        Args:
            config: content of the model's config.json.
            name: name of the model in error messages.

        Raises:
            UserError: a config that builds no such model, or one that the library cannot prune.

        """
        ...

    def fill_tables(self, model: nn.Module) -> None:
        """Fill in the tables that a model's constructor computes, after the model was built on the meta device."""

    def check_config(self, config: Mapping[str, Any], name: str | Path) -> None:
        """Raise UserError for a config with invalid sizes, or sizes so large that building its model would not end."""
        ...

    # calls

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call that predicts for noisy latents, with the model's names for its arguments.

        Args:
            noisy: (B, C, h, w).
            timesteps: (B,), or () for all samples; in the unit of the family's noise process.
            conditions: what `EncodedData.conditions` returns, by role: "text" (B, T, E), the states of the texts; and,
                if the model takes them, "pooled" (B, P), the texts' pooled embeddings, and "sizes" (B, 6): the original
                height and width in pixels, the crop's top and left, and the target's height and width.

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
        """Return an example call with tensors of the right shapes.

        Args:
            model: model whose config gives the channels and widths; it may be on the meta device.
            batch: number of samples B.
            latent: (h, w).
            text_length: number of text tokens T.
            fill: function that makes the values. It is called for "noisy" (B, C, h, w) first, then for each condition,
                with the roles that `call` lists.
            timesteps: (B,) or (); by default one timestep in the middle of the schedule, for all samples.

        """
        ...

    def at(self, call: Call, noisy: Tensor, timesteps: Tensor) -> Call:
        """Return the call with the same conditions, but other noisy latents (B, C, h, w) and timesteps (B,)."""
        ...

    def noisy(self, call: Call) -> Tensor:
        """Return the noisy latents of a call, (B, C, h, w)."""
        ...

    def starting(self, call: Call) -> Tensor:
        """Return the noisy latents of a call in the form in which a pipeline takes its initial latents."""
        ...

    def text_length(self, call: Call) -> int:
        """Return the number of text tokens of a call."""
        ...

    # shapes, from a model's config

    def latent_channels(self, model: nn.Module) -> int:
        """Return C, the number of channels of the latents."""
        ...

    def latent_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Return the latent size (h, w) that the model was made for; None if its config does not say."""

    def text_width(self, model: nn.Module) -> int:
        """Return E, the width of the text states."""
        ...

    def pooled_width(self, model: nn.Module) -> int:
        """Return P, the width of the pooled text embedding; 0 where the model takes none."""
        ...

    # parts

    def blocks(self, model: nn.Module, inner: bool = True) -> dict[str, nn.Module]:
        """Return the blocks whose outputs are distilled, by path, in the order of a forward pass.

        inner: whether to include the middle block, if the model has one (a UNet's mid block).
        """
        ...

    def hidden(self, output: Any) -> Tensor:
        """Return the hidden states from the output of one of the `blocks`."""
        ...

    def regions(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules that are compiled separately."""
        ...
