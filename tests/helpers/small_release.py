"""Write a release in APTP's published format, independently of the importer: gate vectors, router, checkpoints."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import prunekit as pk

EXPERTS = 3


def published_modules(unet):
    """Return (path, units) of the width gates and of the depth gates in published order, from the UNet's modules."""
    widths, depths = [], []
    blocks = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    blocks += [("mid_block", unet.mid_block)]
    blocks += [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
    for path, block in blocks:
        attentions = getattr(block, "attentions", None) or []
        widths += [(f"{path}.resnets.{i}", resnet.norm2.num_groups) for i, resnet in enumerate(block.resnets)]
        for i, layer in enumerate(attentions):
            (inner,) = layer.transformer_blocks
            inside = f"{path}.attentions.{i}.transformer_blocks.0"
            widths += [(f"{inside}.attn1", inner.attn1.heads), (f"{inside}.attn2", inner.attn2.heads)]
            widths += [(f"{inside}.ff", 32)]
        if path != "mid_block":
            depths += [(f"{path}.resnets.{len(block.resnets) - 1}", 1)]
            depths += [(f"{path}.attentions.{len(attentions) - 1}", 1)] if attentions else []
    return widths, depths


def draw(unet, seed):
    """Return random gates by path, and the same gates as a published vector."""
    widths, depths = published_modules(unet)
    generator = torch.Generator().manual_seed(seed)
    gates = {(path, index >= len(widths)): torch.rand(size, generator=generator).clamp(max=0.99) + 0.01
             for index, (path, size) in enumerate([*widths, *depths])}  # fmt: skip
    for (_, is_depth), values in gates.items():
        if not is_depth:
            values[0] = 0.5  # the smallest value that keeps a unit
    return gates, torch.cat(list(gates.values()))


def expected(space, gates):
    by_name = {group.name: gates[group.path, group.is_depth] >= 0.5 for group in space.groups}
    return pk.Architecture(space, torch.cat([by_name[group.name] for group in space.groups]))


def write_release(folder: Path, unet):
    """Write a release of a UNet. Experts 0 and 1 have checkpoints, expert 1 an older one too; expert 2 has none.

    Returns (folder, gates and vector of each expert, layers of the router, codes).
    """
    drawn = [draw(unet, seed) for seed in range(EXPERTS)]
    vectors = torch.stack([vector for _, vector in drawn])
    widths, depths = published_modules(unet)
    structure = {"width": [[size] for _, size in widths], "depth": [[1] for _ in depths]}
    generator, size = torch.Generator().manual_seed(9), 64
    sizes = [size for _, size in widths] + [len(depths)]
    layers = {f"mh_fc.{i}.weight": torch.randn(n, size, generator=generator) for i, n in enumerate(sizes)}
    layers |= {f"mh_fc.{i}.bias": torch.randn(n, generator=generator) for i, n in enumerate(sizes)}
    codes = torch.randn(EXPERTS, vectors.shape[1], generator=generator)
    for name, tensors in (("hypernet", layers), ("quantizer", {"embedding.weight": codes, "embedding_gs": vectors})):
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"structure": structure}))
    space = pk.discover(unet, "aptp")
    for index, checkpoint in ((0, "checkpoint-30000"), (1, "checkpoint-500"), (1, "checkpoint-30000")):
        place = folder / f"arch{index}" / checkpoint
        tuned = pk.slice_unet(unet, expected(space, drawn[index][0]))
        with torch.no_grad():
            tuned.conv_out.bias.fill_(float(index + 1) if checkpoint == "checkpoint-30000" else 0.0)
        place.mkdir(parents=True)
        torch.save(vectors[index : index + 1], place / "arch_vector.pt")
        (place / "unet").mkdir()
        if index == 0:
            save_file(tuned.state_dict(), place / "unet" / "diffusion_pytorch_model.safetensors")
        else:
            torch.save(tuned.state_dict(), place / "unet" / "diffusion_pytorch_model.bin")
    return folder, drawn, layers, codes
