"""Slicing a LoRA of the dense UNet for a pruned UNet: it loses the rows and columns that the layers lost."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from prunekit.core.discovery import whole_space, width_layers
from prunekit.core.record import read_pruning
from prunekit.core.slicing import blank_copy
from prunekit.denoisers.unet.pruned import PrunedUNet2DConditionModel
from prunekit.runtime.errors import UserError

LAYER = re.compile(  # PEFT's, diffusers' and diffusers' earlier names of a layer's two matrices
    r"(?P<path>.+?)[._](?:lora_|lora[._]|lora_linear_layer\.)(?P<side>A|B|down|up)(?:\.[^.]+)?\.weight"
)
_PREFIX, _ALPHA = "unet.", ".alpha"
_OF_OTHERS = ("text_encoder.", "text_encoder_2.")
DOWN = ("A", "down")  # the matrix on the layer's input: (rank, in); the other is (out, rank)


def slice_lora(
    state: Mapping[str, Tensor],
    unet: PrunedUNet2DConditionModel,
    alphas: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Return the LoRA weights of the dense UNet cut for a pruned UNet, for `pipeline.load_lora_weights`.

    The pruned UNet with the sliced A and B equals the dense UNet with W + B·A, cut afterwards. Removed layers lose
    their LoRA weights; text encoders keep theirs.

    Args:
        state: LoRA weights by name, the first result of `StableDiffusionPipeline.lora_state_dict(FILE)`. FILE may come
            from any program.
        unet: pruned UNet of tier "class".
        alphas: alphas by name, the second result of `lora_state_dict`. A layer's scale alpha/rank is multiplied into
            its B, so the result needs no alphas.

    Raises:
        UserError: the UNet is in its stock form, whose layers are renumbered; a name is not a LoRA's; or a matrix does
            not belong to the dense UNet's layer.

    """
    if not isinstance(unet, PrunedUNet2DConditionModel):
        raise UserError(
            "a UNet in its stock form does not record what was cut, and its layers are renumbered, so a LoRA "
            "of the dense UNet would change the wrong layers; use tier class, or merge the LoRA before pruning "
            "(the recipe's `lora`)"
        )
    dense, outs, ins, gone = _channels(unet)
    numbers: dict[str, Tensor | float] = {
        **{name: value for name, value in state.items() if name.endswith(_ALPHA)},
        **(alphas or {}),
    }
    scales = {layer_of(name.removesuffix(_ALPHA)): float(value) for name, value in numbers.items()}
    sliced = {}
    for name, value in state.items():
        if name.endswith(_ALPHA):
            continue
        match = LAYER.fullmatch(name)
        if match is None:
            raise UserError(
                f"{name} is not a LoRA weight in a known format; read the file by "
                "StableDiffusionPipeline.lora_state_dict"
            )
        layer, is_down = layer_of(name), match["side"] in DOWN
        alpha = None if is_down else scales.get(layer)
        value = value if alpha is None else value * (alpha / value.shape[1])
        if not name.startswith(_OF_OTHERS):
            path = layer.removeprefix(_PREFIX)
            if path not in dense:
                raise UserError(
                    f"{name} belongs to a layer that the dense UNet does not have: the LoRA was made for another model"
                )
            if any(path == layer or path.startswith(layer + ".") for layer in gone):
                continue
            axis, kept = (1, ins.get(path)) if is_down else (0, outs.get(path))
            if value.shape[axis] != dense[path][axis]:
                raise UserError(
                    f"{name} is {tuple(value.shape)}, which does not fit the dense UNet's layer {dense[path]}: "
                    "the LoRA was made for another model"
                )
            value = value if kept is None else value.index_select(axis, torch.tensor(kept, device=value.device))
        sliced[name] = value
    return sliced


def layer_of(name: str) -> str:
    """Return the path of a LoRA weight's layer; `name` is the weight's, or an alpha's without its ending."""
    match = LAYER.fullmatch(name)
    path = (match["path"] if match else name).replace(".processor.", ".")
    return f"{path}.0" if path.endswith(".to_out") else path


def _channels(
    unet: PrunedUNet2DConditionModel,
) -> tuple[dict[str, tuple[int, int]], dict[str, list[int]], dict[str, list[int]], set[str]]:
    """Return by layer (out, in) channels of the dense UNet, kept out channels, kept in channels; and removed paths."""
    dense = blank_copy(unet)
    shapes = {
        name.removesuffix(".weight"): (p.shape[0], p.shape[1]) for name, p in dense.named_parameters() if p.dim() > 1
    }
    outs: dict[str, list[int]] = {}
    ins: dict[str, list[int]] = {}
    gone: set[str] = set()
    if unet.config.get("pruning") is None:
        return shapes, outs, ins, gone
    layers = width_layers(dense)
    architecture = read_pruning(unet.config["pruning"], whole_space(unet.structure, dense))
    for group in architecture.removed():
        gone.update(group.covers)
    for group in architecture.space.width_groups:
        kept = architecture.kept(group.name)
        if len(kept) == 0:
            gone.update(f"{group.path}.{axis.layer}" for axis in layers[group.name].axes)
        elif len(kept) < group.size:
            for axis in layers[group.name].axes:
                side = ins if axis.side == "in" else outs
                side[f"{group.path}.{axis.layer}"] = axis.channels(kept, group)
    return shapes, outs, ins, gone
