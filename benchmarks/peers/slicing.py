"""Time slicing of Stable Diffusion 2.1 in float32, and compare with torch-pruning's dependency graph.

Both make a copy in which every ResBlock keeps the same half of its hidden channels. The relative difference of the
outputs is printed first. torch-pruning copies the UNet, traces it at a latent of 8 x 8, and cuts group by group, in
place. The last lines are the time and the peak memory of slicing all kinds of units.
Run: python benchmarks/peers/slicing.py
"""

import copy

import torch
import torch_pruning as tp
from shared import compare, options, sd21, where

import prunekit as pk
from prunekit.core.space import Architecture
from prunekit.measuring.clock import peak_memory, timed_inputs


def main() -> None:
    """Print the tables."""
    given = options(__doc__.splitlines()[0], keep=0.5)
    where()
    unet = sd21()
    inputs = timed_inputs(unet, 1, 8, 77)
    resnets = pk.discover(unet, "none", include="*.resnets.*")
    drawn = resnets.random(given.keep)
    values = drawn.values.clone()
    for group in resnets.groups:
        values[resnets.slice(group).start] = True  # torch-pruning cannot empty a layer
    half = Architecture(resnets, values)

    def ours() -> torch.nn.Module:
        return pk.slice_unet(unet, half)

    def theirs() -> torch.nn.Module:
        pruned = copy.deepcopy(unet).requires_grad_(True)
        graph = tp.DependencyGraph().build_dependency(pruned, inputs, verbose=False)
        for group in resnets.groups:
            module = pruned.get_submodule(group.path)
            kept = set(half.kept(group.name))
            cut = [unit for unit in range(group.size) if unit not in kept]
            channels = [unit * group.channels + i for unit in cut for i in range(group.channels)]
            if channels:
                graph.get_pruning_group(module.conv1, tp.prune_conv_out_channels, idxs=channels).prune()
                module.norm2.num_groups = len(kept)  # torch-pruning does not change it
        return pruned

    models = (ours(), theirs())
    with torch.no_grad():
        a, b = (model(**inputs).sample for model in models)
    del models
    print(f"relative difference of the outputs: {((a - b).norm() / a.norm()).item():.1e}")
    compare("ResBlocks of SD 2.1", {"prunekit slice_unet": ours, "torch-pruning, graph and cuts": theirs}, given.pairs)

    space = pk.discover(unet)
    mixed = space.random(0.7)
    compare("All kinds of units of SD 2.1", {"prunekit slice_unet": lambda: pk.slice_unet(unet, mixed)}, given.pairs)
    made = []
    peak = peak_memory(lambda: made.append(pk.slice_unet(unet, mixed)), "cpu")
    dense, pruned = (sum(p.nbytes for p in model.parameters()) for model in (unet, made[0]))
    if peak is not None:
        over = f"peak beyond the dense model {peak / 1e9:.2f} GB, {peak / pruned:.2f} of the copy"
        print(f"dense {dense / 1e9:.2f} GB, sliced copy {pruned / 1e9:.2f} GB, {over}")


if __name__ == "__main__":
    main()
