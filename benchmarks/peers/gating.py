"""Time a UNet under gates and the stock UNet with the same weights: forward, and forward + backward to the gates.

The stock UNet's backward pass computes the gradient of its input; its weights are frozen.
Run: python benchmarks/peers/gating.py [--latent 32] [--batch 1]
"""

import torch
from shared import compare, options, sd21, twin, where

import prunekit as pk
from prunekit.measuring.clock import timed_inputs


def main() -> None:
    """Print the tables."""
    given = options(__doc__.splitlines()[0], latent=32, batch=1, dtype="float32", forward=1, backward=1)
    where()
    stock = sd21(given.dtype)
    unet = twin(stock)
    space = pk.discover(unet)
    inputs = dict(timed_inputs(stock, given.batch, given.latent, 77))
    sample = inputs.pop("sample")
    g = torch.rand(given.batch, space.size, generator=torch.Generator().manual_seed(0))
    title = f"SD 2.1, {given.dtype}, latent {given.latent}, batch {given.batch}"
    with pk.gated(unet, space) as gates:

        @torch.no_grad()
        def stock_forward() -> None:
            stock(sample, **inputs)

        @torch.no_grad()
        def gated_forward() -> None:
            gates.set(g)
            unet(sample, **inputs)

        def stock_backward() -> None:
            entered = sample.clone().requires_grad_(True)
            stock(entered, **inputs).sample.sum().backward()

        def gated_backward() -> None:
            learned = g.clone().requires_grad_(True)
            gates.set(learned)
            unet(sample, **inputs).sample.sum().backward()

        if given.forward:
            compare(f"{title}: forward", {"stock": stock_forward, "gated": gated_forward}, given.pairs)
        if given.backward:
            both = {"stock, to its input": stock_backward, "gated, to the gates": gated_backward}
            compare(f"{title}: forward + backward", both, given.pairs)


if __name__ == "__main__":
    main()
