"""Distillation from the dense model: its output, and the output of each of its blocks (APTP, Eq. 27-29)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from prunekit.core.registry import denoiser_of
from prunekit.training.diffusion import per_sample_mse

FeatureBlocks = Literal["all", "down_up", "none"]  # every block; all but the mid block; no block
FeatureScale = Literal["sum", "mean", "normalised"]
FEATURE_SCALE = (  # the setting's description
    "Sum over the blocks' errors. sum: as in the paper (Eq. 28); mean: as in its published code; normalised: "
    "mean of the errors, each divided by the mean square of the teacher's output."
)


@contextmanager
def block_outputs(model: nn.Module, which: FeatureBlocks = "all") -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that every forward pass fills with the blocks' outputs, by path; remove the hooks on exit."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            outputs[path] = denoiser.hidden(output)

        return hook

    denoiser = denoiser_of(model)
    blocks = {} if which == "none" else denoiser.blocks(model, inner=which == "all")
    handles = [block.register_forward_hook(keep(path)) for path, block in blocks.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def distillation_error(
    prediction: Tensor,
    teacher: Tensor,
    blocks: dict[str, Tensor],
    teacher_blocks: dict[str, Tensor],
    scale: FeatureScale = "sum",
) -> Tensor:
    """Return each sample's output error plus its blocks' errors, (B,) (Eq. 27-29).

    A block is compared if both dictionaries have it and its shapes agree. The residual stream keeps its width, but
    inside a removed stage the hidden states have another height and width. The up block of a removed stage is compared,
    because its replacement passes on hidden states of the size that the teacher's block returns.
    """
    error, compared = per_sample_mse(prediction, teacher), []
    for path, reference in teacher_blocks.items():
        if path in blocks and blocks[path].shape == reference.shape:
            block_error = per_sample_mse(blocks[path], reference)
            compared.append(block_error / reference.float().square().mean() if scale == "normalised" else block_error)
    share = 1.0 if scale == "sum" else 1 / max(1, len(compared))
    return sum((share * term for term in compared), start=error)
