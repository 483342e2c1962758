"""What the library needs to know of a model class: the protocol that each folder of `prunekit.denoisers` implements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import Tensor, nn

    from .call import Call, Fill
    from .family import Family


class Denoiser(Protocol):
    """One model class, or several alike, described to the library; it holds no state.

    A description may have more, which one method needs: `levels`, which BK-SDM thins, is a UNet's alone.
    """

    family: Family  # what pipelines do around such a model

    def from_config(self, config: Mapping[str, Any], name: str | Path) -> ModelMixin:
        """Build a model, stock or pruned, on the meta device and in evaluation mode.

        Args:
            config: its config.json.
            name: what errors call it.

        Raises:
            UserError: a config that builds no such model, or one that the library cannot prune.

        """
        ...

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
        model: ModelMixin,
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
            fill: makes the values. It is asked for "noisy" (B, C, h, w) first, then for the conditions by role, as
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

    def text_length(self, call: Call) -> int:
        """Return the tokens of a call's text."""
        ...

    # shapes, from a model's config

    def latent_channels(self, model: ModelMixin) -> int:
        """Return C, the channels of the latents."""
        ...

    def latent_size(self, model: ModelMixin) -> tuple[int, int] | None:
        """Return the latent's (h, w) that a model was made for; None where its config does not say."""
        ...

    def text_width(self, model: ModelMixin) -> int:
        """Return E, the width of the text states."""
        ...

    def pooled_width(self, model: ModelMixin) -> int:
        """Return P, the width of the pooled text embedding; 0 where the model takes none."""
        ...

    # parts

    def blocks(self, model: ModelMixin, inner: bool = True) -> dict[str, nn.Module]:
        """Return the blocks whose outputs are distilled, by path, in the order of a forward pass.

        inner: with the block in the middle, where the model has one (a UNet's mid block).
        """
        ...

    def regions(self, model: ModelMixin) -> list[nn.Module]:
        """Return the modules that are compiled, each by itself."""
        ...
