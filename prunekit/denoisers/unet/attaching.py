"""Attaching to a pruned UNet by layer names: PEFT adapters such as LoRA, attention processors, IP-Adapters.

They attach to the remaining layers. The name of a removed layer raises an error that names the layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0
from diffusers.models.model_loading_utils import load_state_dict
from torch import nn

from prunekit.core.cutting import units_to_channels
from prunekit.core.emptied import Emptied
from prunekit.core.record import kept_units
from prunekit.core.slicing import blank_of
from prunekit.runtime.errors import UserError

from .removed import BYPASSED

LORA_FILE = "pytorch_lora_weights.safetensors"  # the file that `save_lora_adapter` writes
_IP = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0)


class AttachableUNet(UNet2DConditionModel):
    """A UNet that may lack layers of its config; it checks the layer names of adapters and processors."""

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add an adapter; raise UserError if target_modules names a removed layer, or matches only removed layers."""
        targets = getattr(adapter_config, "target_modules", None) or ()
        for target in () if isinstance(targets, str) else sorted(targets):
            if (layer := removed_layer(self, target)) is not None:
                raise UserError(
                    f"target_modules names {target!r}, but {layer} was removed from this UNet. Remove the name "
                    "from target_modules."
                )
        if targets and not _matching(self, targets) and (gone := _matching(blank_copy(self), targets)):
            raise UserError(
                f"target_modules matches no layer of this UNet. All {len(gone)} layers that it matches in the "
                f"dense UNet were removed: {', '.join(gone[:3])}{', ...' * (len(gone) > 3)}. Name remaining "
                "layers."
            )
        super().add_adapter(adapter_config, adapter_name)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, torch.Tensor],
        prefix: str | None = "transformer",
        *arguments: Any,
        **options: Any,
    ) -> None:
        """Load a LoRA; raise UserError if it has weights of a removed layer. Files on the Hub are not checked."""
        start = "" if prefix is None else f"{prefix}."
        for name in _names(pretrained_model_name_or_path_or_dict, options.get("weight_name")):
            layer = removed_layer(self, name.removeprefix(start)) if name.startswith(start) else None
            if layer is not None:
                raise UserError(
                    f"this LoRA has weights for {layer}, which was removed from this UNet. Cut a LoRA of the dense "
                    "UNet with prunekit.export.slice_lora first."
                )
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, prefix, *arguments, **options)

    def set_attn_processor(self, processor: Any) -> None:
        """Set the attention processors; raise UserError for a processor of a removed layer."""
        for name in processor if isinstance(processor, dict) else ():
            if (layer := removed_layer(self, name)) is not None:
                raise UserError(
                    f"the processors include {name!r}, but {layer} was removed from this UNet. Give one processor for "
                    "each name in unet.attn_processors."
                )
        super().set_attn_processor(processor)

    def _convert_ip_adapter_attn_to_diffusers(
        self, state_dicts: list[dict[str, Any]], **options: Any
    ) -> dict[str, Any]:
        """Return this UNet's attention processors with those of IP-Adapters, cut to the remaining heads."""
        dense = blank_copy(self)
        forms = [{**state, "ip_adapter": _dense_form(state["ip_adapter"], self, dense)} for state in state_dicts]
        dense_processors = UNet2DConditionModel._convert_ip_adapter_attn_to_diffusers(dense, forms, **options)
        processors = self.attn_processors  # self-attentions keep their processors
        return cut_processors(
            {**processors, **{name: new for name, new in dense_processors.items() if isinstance(new, _IP)}}, self
        )

    def _load_ip_adapter_loras(self, state_dicts: list[dict[str, Any]]) -> dict[int, dict[str, torch.Tensor]]:
        """Return the LoRAs that some IP-Adapters hold; they are numbered by the dense UNet's attentions."""
        return UNet2DConditionModel._load_ip_adapter_loras(blank_copy(self), state_dicts)


def removed_layer(unet: nn.Module, name: str) -> str | None:
    """Return the path of the removed layer that contains a module of the dense UNet; None if there is none.

    name: name of the module, or of anything in it, such as a parameter.
    """
    module: nn.Module | None = unet
    path: list[str] = []
    for part in name.split("."):
        if module is None or isinstance(module, BYPASSED) or part not in module._modules:
            break
        module = module._modules[part]
        path.append(part)
    return ".".join(path) if isinstance(module, (*BYPASSED, Emptied)) else None


def blank_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a UNet of the dense config, without weights, on the meta device."""
    return blank_of(UNet2DConditionModel, unet)


def cut_processors(processors: Mapping[str, Any], unet: UNet2DConditionModel) -> dict[str, Any]:
    """Return the dense UNet's processors for a pruned UNet's layers, with IP-Adapters cut to the remaining heads."""
    cut = {}
    for name in unet.attn_processors:
        processor = processors[name]
        if isinstance(processor, _IP):
            path = name.removesuffix(".processor")
            dense = unet.get_submodule(path).query_dim  # in these UNets the heads are together as wide as the input
            if processor.hidden_size != dense:
                raise UserError(
                    f"this IP-Adapter has {processor.hidden_size} channels for {path}, which has {dense} in the dense "
                    "UNet: it was made for another model"
                )
            cut[name] = _cut(processor, _channels(unet, name))
        else:
            cut[name] = type(processor)()
    return cut


def _cut(processor: IPAdapterAttnProcessor, channels: list[int]) -> IPAdapterAttnProcessor:
    """Return a copy of an IP-Adapter's processor with these channels of its keys and values."""
    cut = type(processor)(len(channels), processor.cross_attention_dim, processor.num_tokens, processor.scale)
    for ours, theirs in ((cut.to_k_ip, processor.to_k_ip), (cut.to_v_ip, processor.to_v_ip)):
        for layer, source in zip(ours, theirs, strict=True):
            layer.weight = nn.Parameter(source.weight.detach()[channels], source.weight.requires_grad)
    return cut


def _channels(unet: UNet2DConditionModel, name: str) -> list[int]:
    """Return the channels of the dense attention that are left; `name` is the name of the attention's processor."""
    path = name.removesuffix(".processor")
    attention = unet.get_submodule(path)
    kept = kept_units(unet, f"attention:{path}")
    return units_to_channels(range(attention.heads) if kept is None else kept, attention.inner_dim // attention.heads)


def _dense_form(
    weights: Mapping[str, torch.Tensor], unet: UNet2DConditionModel, dense: UNet2DConditionModel
) -> dict[str, torch.Tensor]:
    """Return an IP-Adapter's keys and values, numbered and sized for the dense UNet.

    weights: named `NUMBER.to_k_ip.weight` and `NUMBER.to_v_ip.weight`, in the order of the dense UNet's
        cross-attentions, or of the pruned UNet's for an IP-Adapter that was trained on the pruned UNet.
    """
    of_dense, of_unet = ([n for n in model.attn_processors if n.endswith("attn2.processor")] for model in (dense, unet))
    numbers = sorted({int(key.partition(".")[0]) for key in weights if "to_k_ip" in key})
    names = next((names for names in (of_dense, of_unet) if len(names) == len(numbers)), None)
    if names is None:
        raise UserError(
            f"this IP-Adapter has weights for {len(numbers)} cross-attentions; the dense UNet has {len(of_dense)} and "
            f"this one {len(of_unet)}: it was made for another model"
        )
    number_of, form = dict(zip(names, numbers, strict=True)), {}
    for position, name in enumerate(of_dense):
        total = dense.get_submodule(name.removesuffix(".processor")).inner_dim
        for kind in ("to_k_ip", "to_v_ip"):
            weight = weights[f"{number_of[name]}.{kind}.weight"] if name in number_of else None
            if weight is None:  # a removed layer: an adapter trained on this UNet has no weights for it
                weight = torch.zeros(total, next(iter(weights.values())).shape[1])
            elif weight.shape[0] != total:
                channels = _channels(unet, name) if name in of_unet else ()
                if weight.shape[0] != len(channels):
                    raise UserError(
                        f"this IP-Adapter has {weight.shape[0]} channels for {name.removesuffix('.processor')}, which "
                        f"has {total} in the dense UNet and {len(channels)} in this one: it was made for another model"
                    )
                weight = weight.new_zeros(total, weight.shape[1]).index_copy(
                    0, torch.tensor(channels, device=weight.device), weight
                )
            form[f"{2 * position + 1}.{kind}.weight"] = weight
    return form


def _matching(unet: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Return the names of the modules that match PEFT's target_modules: a regular expression, or ends of names."""
    names = (name for name, _ in unet.named_modules() if name)
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    ends = tuple(f".{target}" for target in targets)
    return [name for name in names if f".{name}".endswith(ends)]


def _names(source: str | Path | Mapping[str, Any], weight_name: str | None) -> Iterable[str]:
    """Return the names of the tensors in a LoRA: a mapping, a local file or a local folder; () for other sources."""
    if isinstance(source, Mapping):
        return source
    path = Path(source) if Path(source).is_file() else Path(source, weight_name or LORA_FILE)
    return load_state_dict(str(path)) if path.is_file() else ()
