"""Using a pruned UNet with models that were made for the dense UNet: ControlNet, T2I-Adapter, IP-Adapter.

A cut never changes the width of the hidden states between layers. So the residuals of a ControlNet or a T2I-Adapter fit
a UNet that keeps the positions of its layers (tier "class") and all its stages. The stock form of a cut has fewer
positions. Call these functions first: diffusers stops with an error about sizes, or silently broadcasts a residual of
size 1 x 1.
"""

from __future__ import annotations

from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel

from prunekit.denoisers.unet.attaching import cut_processors
from prunekit.denoisers.unet.pruned import PrunedUNet2DConditionModel
from prunekit.denoisers.unet.removed import BYPASSED
from prunekit.runtime.errors import UserError

Place = tuple[int, int]  # channels, and how many times smaller than the latent


def check_controlnet(unet: UNet2DConditionModel, controlnet: ControlNetModel) -> None:
    """Raise UserError if a ControlNet's residuals do not fit the UNet's skips one to one."""
    (skips, inner), (given, last) = _skips(unet), _skips(controlnet)
    if (reason := _difference(skips, given, "skip")) is not None:
        raise UserError(f"this ControlNet does not fit: {reason}")
    if unet.mid_block is not None and inner != last:
        raise UserError(f"this ControlNet does not fit: its last residual is {last}, the UNet's mid block {inner}")
    if unet.mid_block is None:
        raise UserError(
            "this ControlNet does not fit: its last residual is for a mid block, which was removed from this UNet"
        )


def check_t2i_adapter(unet: UNet2DConditionModel, adapter: T2IAdapter) -> None:
    """Raise UserError, with the reason, if a T2I-Adapter's features do not fit the UNet's down blocks."""
    places: list[tuple[int, int]] = []
    given: list[tuple[int, int]] = []
    scale = 1
    for block in unet.down_blocks:
        places.append((unet.config.block_out_channels[len(places)], scale))
        scale *= 1 + any(not isinstance(sampler, BYPASSED) for sampler in block.downsamplers or ())
    scale = 1
    for width, body in zip(adapter.config.channels, adapter.adapter.body, strict=True):
        scale *= 1 if body.downsample is None else 2
        given.append((width, scale))
    if (reason := _difference(places, given, "down block")) is not None:
        raise UserError(f"this T2I-Adapter does not fit: {reason}")


def copy_ip_adapter(dense: UNet2DConditionModel, unet: UNet2DConditionModel) -> None:
    """Copy the IP-Adapter that was loaded into the dense UNet to a pruned UNet, cut to its remaining heads.

    Args:
        dense: dense UNet, after `pipeline.load_ip_adapter`.
        unet: pruned UNet of tier "class".

    Raises:
        UserError: the dense UNet has no IP-Adapter, or the pruned UNet is in its stock form.

    """
    if getattr(dense, "encoder_hid_proj", None) is None:
        raise UserError("this UNet has no IP-Adapter; load one into the dense pipeline first, with load_ip_adapter")
    if not isinstance(unet, PrunedUNet2DConditionModel):
        raise UserError(
            "this IP-Adapter does not fit: a UNet in its stock form does not record what was cut, and its "
            "layers are renumbered; use tier class"
        )
    unet.set_attn_processor(cut_processors(dense.attn_processors, unet))
    unet.encoder_hid_proj = dense.encoder_hid_proj
    unet.config.encoder_hid_dim_type = "ip_image_proj"


def _skips(model: UNet2DConditionModel | ControlNetModel) -> tuple[list[Place], Place]:
    """Return the places of a UNet's skips or a ControlNet's residuals, and the place of the innermost hidden state."""
    channels, scale = model.conv_in.out_channels, 1
    places = [(channels, scale)]
    for index, block in enumerate(model.down_blocks):
        for resnet in block.resnets:
            channels = channels if isinstance(resnet, BYPASSED) else model.config.block_out_channels[index]
            places.append((channels, scale))
        for sampler in block.downsamplers or ():
            scale *= 1 if isinstance(sampler, BYPASSED) else 2
            places.append((channels, scale))
    return places, (channels, scale)


def _difference(places: list[Place], given: list[Place], what: str) -> str | None:
    """Return in words how the residuals `given` differ from `places`; None if they fit. `what` names a place."""
    if len(places) != len(given):
        return (
            f"it has {len(given)} residuals, and this UNet has {len(places)} {what}s, because whole layers or "
            "stages were removed; if no stage was removed, use tier class, which keeps their positions"
        )
    for index, (place, residual) in enumerate(zip(places, given, strict=True)):
        if place != residual:
            return (
                f"residual {index} has {residual[0]} channels at 1/{residual[1]} of the latent, {what} {index} has "
                f"{place[0]} at 1/{place[1]}: a stage was removed, or it was made for another model"
            )
    return None
