"""Time finding the units and the cost of Stable Diffusion 2.1, on the meta device, and compare with other libraries.

The libraries do different work. torch-pruning traces which layers must be cut together. FlopCounterMode and thop count
the operations of one architecture. prunekit finds the groups and gives the cost of every architecture. fvcore does not
work on the meta device, so it runs the UNet on the CPU at a latent of 8 x 8, with weights that take no memory.
Run: python benchmarks/peers/costing.py
"""

import contextlib
import io

import torch
import torch_pruning as tp
from shared import compare, options, where
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import prunekit as pk
from prunekit.measuring.clock import timed_inputs
from prunekit.models import load_unet_on_meta

LATENT, TEXT = 96, 77


class Called(nn.Module):
    """A UNet that is called with one tensor, as thop and fvcore require."""

    def __init__(self, unet: nn.Module, device: str, latent: int):
        super().__init__()
        self.unet = unet
        if device != "meta":
            for module in unet.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    zero = torch.zeros((), device=device).expand(parameter.shape)
                    setattr(module, name, nn.Parameter(zero, requires_grad=False))
        self.inputs = dict(timed_inputs(unet, 1, latent, TEXT))
        self.sample = self.inputs.pop("sample")

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.unet(sample, **self.inputs, return_dict=False)[0]


def main() -> None:
    """Print the tables."""
    given = options(__doc__.splitlines()[0])
    where()
    unet = load_unet_on_meta("sd-2.1")

    def ours() -> int:
        return pk.CostModel(unet, pk.discover(unet)).dense_macs

    def dependency_graph() -> None:
        inputs = timed_inputs(unet, 1, 8, TEXT)
        tp.DependencyGraph().build_dependency(unet.requires_grad_(True), dict(inputs), verbose=False)

    @torch.no_grad()
    def flop_counter() -> int:
        with FlopCounterMode(display=False) as counter:
            unet(**timed_inputs(unet, 1, LATENT, TEXT))
        return counter.get_total_flops() // 2

    arms = {
        "prunekit discover + CostModel": ours,
        "torch-pruning DependencyGraph": dependency_graph,
        "FlopCounterMode": flop_counter,
    }
    with contextlib.suppress(ImportError):
        import thop

        def with_thop() -> int:
            called = Called(load_unet_on_meta("sd-2.1"), "meta", LATENT)
            with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
                return int(thop.profile(called, (called.sample,), verbose=False)[0])

        arms["thop"] = with_thop
    with contextlib.suppress(ImportError):
        from fvcore.nn import FlopCountAnalysis

        called = Called(load_unet_on_meta("sd-2.1"), "cpu", 8)

        @torch.no_grad()
        def with_fvcore() -> int:
            analysis = FlopCountAnalysis(called, (called.sample,)).tracer_warnings("none")
            return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()

        arms["fvcore (8 x 8)"] = with_fvcore
    assert ours() == flop_counter()
    compare("Units and costs of SD 2.1", arms, given.pairs)

    space = pk.discover(unet)
    cost = pk.CostModel(unet, space)
    gates = torch.rand(1000, space.size, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def soft() -> None:
        gates.grad = None
        cost.macs(gates).sum().backward()

    compare("MACs of 1,000 soft architectures, with gradient", {"prunekit CostModel.macs": soft}, 4 * given.pairs)


if __name__ == "__main__":
    main()
