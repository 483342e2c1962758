"""Compare a ResBlock's gate before `norm2`, as in APTP's published code, with prunekit's gate after `norm2`.

Masks a share of the channel groups in every ResBlock of the embedded model, in the input of `norm2` or of `conv2`, and
compares the output with the UNet that is sliced by the same mask. Also takes the gradient of the summed squared output
with respect to every gate, with all ResBlock gates at 1/2.
Run: python benchmarks/gate_before_norm.py [--keep 0.7]
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

import prunekit as pk
from prunekit.models import load_pipeline


@contextmanager
def gated_before_norm(unet, space: pk.UnitSpace, gates: torch.Tensor) -> Iterator[None]:
    """Multiply the channels of every ResBlock by their group's gate before `norm2`; other units stay open."""

    def hook(group):
        values = gates[space.slice(group)].repeat_interleave(group.channels)
        return lambda module, inputs: (inputs[0] * values[:, None, None],)

    resnets = [group for group in space.width_groups if group.kind == "resnet"]
    handles = [unet.get_submodule(group.path).norm2.register_forward_pre_hook(hook(group)) for group in resnets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    """Print one row per position of the gate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.7, help="share of the groups that stay")
    given = parser.parse_args()
    pipeline = load_pipeline("emoji")
    unet, tokens = pipeline.unet, pipeline.tokenizer.model_max_length
    space = pk.discover(unet, depth="none")
    source = torch.Generator().manual_seed(0)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    inputs = {
        "sample": torch.randn(8, unet.config.in_channels, side, side, generator=source),
        "timestep": torch.full((8,), 500),
        "encoder_hidden_states": torch.randn(8, tokens, width, generator=source),
    }
    resnets = torch.zeros(space.size, dtype=torch.bool)
    for group in space.width_groups:
        resnets[space.slice(group)] = group.kind == "resnet"
    kept = ~resnets | (torch.rand(space.size, generator=source) < given.keep)
    architecture = pk.Architecture(space, kept)

    @contextmanager
    def ours(gates: torch.Tensor) -> Iterator[None]:
        with pk.gated(unet, space) as own:
            own.set(gates)
            yield

    with torch.no_grad():
        sliced = pk.slice_unet(unet, architecture)(**inputs).sample
    print("| gate | masked - sliced, over sliced | median gradient of a gate at 1/2 |\n|---|---:|---:|")
    for name, gated in {"before norm2": partial(gated_before_norm, unet, space), "on conv2's input": ours}.items():
        with torch.no_grad(), gated(kept.float()):
            error = float((unet(**inputs).sample - sliced).norm() / sliced.norm())
        half = torch.where(resnets, 0.5, 1.0).requires_grad_()
        with gated(half):
            (gradient,) = torch.autograd.grad(unet(**inputs).sample.square().sum(), half)
        print(f"| {name} | {error:.1e} | {float(gradient[resnets].abs().median()):.1e} |")


if __name__ == "__main__":
    main()
