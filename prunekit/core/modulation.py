"""Folding: a transformer's modulation layers read a short code instead of the wide vector that all of them share.

Every modulation (AdaLN) layer computes W·u + b of the same vector u = silu(embedding), of width d. If all vectors that
occur are combinations of a few, u = Eᵀ·c with a basis E (k, d), the layer becomes (W·Eᵀ)·c + b: k columns in place of
d. The code c (k,) is of one of two kinds. The entry `folding` of the model's config says which:

{format: 1, kind: "table", timesteps, nearest}: c is a one-hot vector for one of N timesteps, and E holds their vectors.
    Exact at these timesteps.
{format: 1, kind: "rank", rank}: c holds the coordinates of u - mean in `rank` directions, then a 1, which multiplies
    the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.runtime.errors import UserError

FORMAT = 1
KINDS = ("table", "rank")
TOLERANCE = 1e-3  # largest error of a timestep (0 to 1000), beyond the rounding of its dtype


@dataclass(frozen=True)
class Modulation:
    """The location of a transformer's modulation layers.

    embedding: path of the module whose output all modulation layers read, each through its own SiLU.
    layers: last parts of the paths of these linear layers.
    unit: number of timesteps of the noise process (0 to 1000) per unit of the embedding's first argument.
    of_timestep_alone: whether the embedding depends on the timestep alone, and not, for example, on a pooled text.
    """

    embedding: str
    layers: tuple[str, ...]
    unit: float = 1.0
    of_timestep_alone: bool = False

    def linears(self, model: nn.Module) -> dict[str, nn.Linear]:
        """Return a model's modulation layers, by path."""
        endings = tuple(f".{layer}" for layer in self.layers)
        return {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and f".{path}".endswith(endings)
        }


class StepCode(nn.Module):
    """A one-hot vector (N,) for one of N timesteps, in place of the embedding of the timestep.

    timesteps: the timesteps of one sampler's steps, in the unit of the noise process.
    unit: see `Modulation`.
    nearest: whether a timestep that is not in the table is replaced by the nearest one; else it is refused. A
        difference within the rounding of the timestep's dtype is always accepted.
    """

    def __init__(self, timesteps: Sequence[float], unit: float, nearest: bool):
        super().__init__()
        self.timesteps, self.unit, self.nearest = tuple(timesteps), unit, nearest

    def forward(self, timestep: Tensor, hidden_states: Tensor, *args: Any) -> Tensor:
        """Return the one-hot vectors (B, N) of timesteps (B,), in the dtype of `hidden_states`.

        Raises:
            UserError: a timestep is not in the table, and `nearest` is false.

        """
        given = timestep.flatten().float() * self.unit
        table = torch.tensor(self.timesteps, dtype=torch.float32, device=given.device)
        distances = (given[:, None] - table).abs()  # (B, N)
        if not self.nearest and not given.is_meta:
            far = distances.amin(dim=1) > TOLERANCE + torch.finfo(timestep.dtype).eps * given.abs()
            if far.any():
                raise UserError(
                    f"timestep {given[far][0].item():g} is not in this model's table of {len(table)} modulations "
                    f"({self.timesteps[0]:g}, {self.timesteps[1 % len(table)]:g} … {self.timesteps[-1]:g}): sample "
                    f"with the scheduler, the {len(table)} steps and the size of picture that it was folded for"
                )
        steps = torch.arange(len(table), device=given.device)
        return (distances.argmin(dim=1)[:, None] == steps).to(hidden_states.dtype)


def fold(modulation: Modulation | None, model: nn.Module, folding: Mapping[str, Any]) -> None:
    """Replace a model's modulation layers, in place, by layers of the folded shapes; their weights are set afterwards.

    Args:
        modulation: location of the layers; None for a model whose modulation the library does not know.
        model: model that is not folded yet.
        folding: the entry `folding` of a model's config.

    Raises:
        UserError: a model without such layers, or a `folding` that this version does not read.

    """
    if modulation is None:
        raise UserError(f"a {type(model).__name__} has no modulation layers that can be folded")
    size, linears = _size(folding), modulation.linears(model)
    for path, linear in linears.items():
        parent = model.get_submodule(path.rpartition(".")[0])
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.SiLU):
                setattr(parent, name, nn.Identity())
        folded = nn.Linear(size, linear.out_features, bias=False).to(linear.weight)
        folded.bias = linear.bias
        model.set_submodule(path, folded)
    if folding["kind"] == "table":
        code = StepCode(folding["timesteps"], modulation.unit, folding["nearest"])
        model.set_submodule(modulation.embedding, code)
        return
    embedding: Any = model.get_submodule(modulation.embedding)
    width = next(iter(linears.values())).in_features
    embedding.code = nn.Linear(width, folding["rank"]).to(next(embedding.parameters()))
    embedding.register_forward_hook(_coded)


def _coded(module: Any, arguments: Any, output: Tensor) -> Tensor:
    """Return the code (B, rank + 1) of an embedding (B, d): its coordinates, then a 1."""
    code = module.code(F.silu(output))
    return torch.cat([code, torch.ones_like(code[:, :1])], dim=-1)


def _size(folding: Mapping[str, Any]) -> int:
    """Return the length k of the code; raise UserError for a `folding` that this version does not read."""
    if folding.get("format") != FORMAT or folding.get("kind") not in KINDS:
        raise UserError(
            f"the config's folding has format {folding.get('format')!r} and kind {folding.get('kind')!r}; this version "
            f"of prunekit reads format {FORMAT} and the kinds {' and '.join(KINDS)}. Use the version that wrote it"
        )
    return len(folding["timesteps"]) if folding["kind"] == "table" else int(folding["rank"]) + 1
