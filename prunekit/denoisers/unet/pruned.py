"""PrunedUNet2DConditionModel, a UNet whose removed units are physically gone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from prunekit.core.slicing import PrunedModel, config_signature, keep_saved_module

from .attaching import AttachableUNet
from .structure import UNetStructure


class PrunedUNet2DConditionModel(PrunedModel, AttachableUNet):
    """A UNet2DConditionModel without the units that an Architecture removed; built from its config alone.

    Args:
        pruning: None, or {format: 1, kept, removed} as described in `prunekit.core.slicing`; UserError if it does not
            fit.
        folding: None; UserError for any other value, because UNets have no modulation to fold.
        **config: the arguments of UNet2DConditionModel, of the dense UNet.

    """

    structure = UNetStructure()

    def __init__(
        self, pruning: Mapping[str, Any] | None = None, folding: Mapping[str, Any] | None = None, **config: Any
    ):
        super().__init__(**config)
        self._prune(pruning, folding)

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:  # noqa: D102
        self._save_with_names(super().save_pretrained, *arguments, **options)

    # pipelines read the options from the signature
    functools.update_wrapper(save_pretrained, UNet2DConditionModel.save_pretrained)

    def set_attention_slice(self, slice_size: str | int | list[int] = "auto") -> None:
        """Set the attention slice size; "auto" is half of each attention's remaining heads, at least 1."""
        if slice_size != "auto":
            super().set_attention_slice(slice_size)
            return
        for module in self.modules():
            if isinstance(module, Attention):
                module.set_attention_slice(max(1, module.heads // 2))


PrunedUNet2DConditionModel.__init__.__dict__["__signature__"] = config_signature(UNet2DConditionModel)
keep_saved_module(PrunedUNet2DConditionModel)
