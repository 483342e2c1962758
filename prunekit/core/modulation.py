"""FOLD: a transformer's modulation layers over a short code, in place of the wide vector that all of them read.

Every modulation (AdaLN) layer computes W·u + b of the same vector u = silu(embedding), of width d. Where the vectors
that occur are combinations of a few, u = Eᵀ·c with a basis E (k, d), the layer becomes (W·Eᵀ)·c + b: k columns in place
of d. The code c (k,) is of one of two kinds, `folding` in the model's config says which:

{format: 1, kind: "table", timesteps, nearest}: c names one of N timesteps, and E holds their vectors. Exact at these.
{format: 1, kind: "rank", rank}: c holds the coordinates of u - mean in `rank` directions, and a 1, with which the mean
    is multiplied.
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
TOLERANCE = 1e-3  # of a timestep from 0 to 1000, beside what its type rounds


@dataclass(frozen=True)
class Modulation:
    """Where a transformer's modulation lies.

    embedding: path of the module whose output all modulation layers read, each through a SiLU of its own.
    layers: last parts of the paths of these linear layers.
    unit: timesteps of the noise process (0 to 1000) for one of the embedding's first argument.
    of_timestep_alone: whether nothing else enters the embedding, such as a pooled text.
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
    """In place of the embedding of a timestep: which of N timesteps it is, as a vector (N,) with one 1.

    timesteps: of the noise process, those of one sampler's steps. unit: as `Modulation` has it.
    nearest: whether another timestep is taken for the nearest of them; else it is refused. A timestep in a type of low
        precision is taken for the nearest one within that type's rounding.
    """

    def __init__(self, timesteps: Sequence[float], unit: float, nearest: bool):
        super().__init__()
        self.timesteps, self.unit, self.nearest = tuple(timesteps), unit, nearest

    def forward(self, timestep: Tensor, hidden_states: Tensor, *args: Any) -> Tensor:
        """(B,), any tensor of the wanted type -> (B, N).

        Raises:
            UserError: a timestep that is none of the table's, unless the nearest one is taken.

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
    """Give a model's modulation layers the shapes of their folded form, in place; their weights are then to be set.

    Args:
        modulation: where they lie; None for a model of which the library does not know it.
        model: not folded.
        folding: as in a model's config.

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
    """Return the coordinates of an embedding (B, d), and a 1: (B, rank + 1)."""
    code = module.code(F.silu(output))
    return torch.cat([code, torch.ones_like(code[:, :1])], dim=-1)


def _size(folding: Mapping[str, Any]) -> int:
    """Return the length of the code."""
    if folding.get("format") != FORMAT or folding.get("kind") not in KINDS:
        raise UserError(
            f"the config's folding has format {folding.get('format')!r} and kind {folding.get('kind')!r}; this version "
            f"of prunekit reads format {FORMAT} and the kinds {' and '.join(KINDS)}. Use the version that wrote it"
        )
    return len(folding["timesteps"]) if folding["kind"] == "table" else int(folding["rank"]) + 1
