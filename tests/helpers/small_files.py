"""Small pipelines as files of other layouts: one checkpoint file, LoRA weights."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_AUTOENCODER = (
    (r"down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"down.{m[1]}.block.{m[2]}"),
    (r"down_blocks\.(\d)\.downsamplers\.0", lambda m: f"down.{m[1]}.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    ("conv_norm_out", lambda m: "norm_out"),
    ("conv_shortcut", lambda m: "nin_shortcut"),
)


def write_single_file(path: Path, pipeline, **extra) -> Path:
    """Write a Stable Diffusion 1 pipeline of four levels in the layout of the original checkpoints."""
    tensors = {
        f"model.diffusion_model.{_unet_name(name, pipeline.unet)}": value
        for name, value in pipeline.unet.state_dict().items()
    }
    for name, value in pipeline.vae.state_dict().items():
        for pattern, replacement in _AUTOENCODER:
            name = re.sub(pattern, replacement, name)
        tensors[f"first_stage_model.{name}"] = value
    for name, value in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({**{name: value.contiguous() for name, value in tensors.items()}, **extra}, path)
    return path


def _unet_name(name: str, unet) -> str:
    for own, other in _UNET.items():
        if name.startswith(f"{own}."):
            return name.replace(own, other)
    match = re.fullmatch(r"(down|up|mid)_blocks?\.?(\d)?\.(\w+)\.(\d)\.(.+)", name)
    side, level, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        layer, _, leaf = rest.partition(".")
        rest = f"{_RESNET[layer]}.{leaf}"
    if side == "mid":
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{rest}"
    place = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1}[kind]
    if kind == "upsamplers":
        place += hasattr(unet.up_blocks[level], "attentions")
        return f"output_blocks.{3 * level + 2}.{place}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.{rest.replace('conv', 'op')}"
    block = f"input_blocks.{3 * level + index + 1}" if side == "down" else f"output_blocks.{3 * level + index}"
    return f"{block}.{place}.{rest}"


def write_lora(path: Path, layers: dict[str, torch.nn.Linear], rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write LoRA weights for layers by key, such as "unet.mid_block. … .to_q"; return what each adds at scale 1."""
    source, tensors, added = torch.Generator().manual_seed(seed), {}, {}
    for name, layer in layers.items():
        down = torch.randn(rank, layer.in_features, generator=source)
        up = torch.randn(layer.out_features, rank, generator=source)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        added[name] = up @ down
    save_file(tensors, path)
    return added
