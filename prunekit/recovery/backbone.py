"""Train experts that share one set of weights, the backbone.

Each expert runs as a slice of the backbone. The slice's weights are cut from the backbone's inside the autograd graph,
so gradients reach the backbone. A masked UNet and the sliced UNet give the same output (law 1), so training through the
slices has the same gradients as training under the experts' masks. A slice costs only its expert's MACs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from prunekit.core.emptied import names_in_files
from prunekit.core.registry import denoiser_of
from prunekit.core.slicing import blank_copy, share_tables, slice_model
from prunekit.core.space import Architecture
from prunekit.core.timesteps import TimestepBins
from prunekit.recovery.deltas import Deltas
from prunekit.recovery.fine_tuning import FineTuningObjective
from prunekit.runtime.randomness import generator
from prunekit.training.diffusion import NoisePlan

Kept = tuple[Tensor | None, ...]  # for each of the first axes of a weight, the indices that a slice keeps; None: all


@dataclass
class Mixture:
    """Architectures that share a backbone, and the expert of each training pair.

    bins: K timestep bins; expert i then has the architectures i·K to (i + 1)·K - 1, one per bin. None: one architecture
    per expert.
    """

    architectures: Sequence[Architecture]
    experts: Tensor  # (num_pairs,) expert of each pair of the data set
    bins: TimestepBins | None = None

    def of(self, pairs: Tensor, timesteps: Tensor) -> Tensor:
        """Return the index of the architecture of each pair at its timestep; arguments and result are (n,)."""
        experts = self.experts[pairs]
        return experts if self.bins is None else experts * len(self.bins) + self.bins.of(timesteps)


class Member:
    """A slice of a backbone for one Architecture; it owns no weights except optional deltas."""

    def __init__(self, backbone: ModelMixin, architecture: Architecture):
        self.backbone, self.architecture = backbone, architecture
        self.deltas: Deltas | None = None  # changes that are added to the backbone's weights; None: no changes
        self.kept = kept_entries(backbone, architecture)
        self.model = slice_model(blank_copy(backbone), architecture)
        share_tables(denoiser_of(backbone), backbone, self.model)
        self.dense_names = names_in_files(self.model)  # names in the backbone, of the weights whose names differ there

    def take(self) -> ModelMixin:
        """Return the slice with the backbone's current weights; gradients flow through it to the backbone."""
        weights = dict(self.backbone.named_parameters())
        changes = {} if self.deltas is None else dict(self.deltas.changes())
        for name, kept in self.kept.items():
            weight = weights[self.dense_names.get(name, name)]
            for axis, indices in enumerate(kept):
                weight = weight if indices is None else weight.index_select(axis, indices)
            if name in changes:
                weight = weight + changes[name].view_as(weight)
            path, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(path)
            module._parameters.pop(attribute, None)  # a plain attribute: recomputed activations find the same tensor
            setattr(module, attribute, weight)
        return self.model

    @torch.no_grad()
    def sliced(self) -> ModelMixin:
        """Return a standalone frozen model: the backbone's slice with the deltas added."""
        model = slice_model(self.backbone, self.architecture)
        changes = {} if self.deltas is None else dict(self.deltas.changes())
        for name, parameter in model.named_parameters():
            if name in changes:
                parameter.add_(changes[name].view_as(parameter))
        return model.eval().requires_grad_(False)


def kept_entries(model: ModelMixin, architecture: Architecture) -> dict[str, Kept]:
    """Return, by the name of each weight of the sliced model, the indices that it keeps along axes 0 and 1.

    None along an axis stands for all indices. The indices are found by slicing a copy of the model whose weights hold
    their own positions; no full-size weight is allocated.
    """
    marked, shapes = blank_copy(model), {name: parameter.shape for name, parameter in model.named_parameters()}
    entries: dict[str, list[Tensor | None]] = {}
    for axis in (0, 1):
        positions = {
            name: torch.arange(shape[axis], dtype=torch.float32).view(-1, *[1] * (len(shape) - axis - 1)).expand(shape)
            if axis < len(shape)
            else torch.zeros(()).expand(shape)
            for name, shape in shapes.items()
        }
        marked.load_state_dict(positions, strict=False, assign=True)  # tables are left out
        sliced = slice_model(marked, architecture)
        dense_names = names_in_files(sliced)
        for name, weight in sliced.named_parameters():
            kept = weight.detach()[..., None].movedim(axis, 0).flatten(1)[:, 0] if axis < weight.ndim else None
            if kept is not None and len(kept) == shapes[dense_names.get(name, name)][axis]:
                kept = None
            entries.setdefault(name, []).append(None if kept is None else kept.long().to(model.device))
    return {name: tuple(kept) for name, kept in entries.items()}


@dataclass
class BackboneObjective(FineTuningObjective):
    """Denoising and distillation of all experts of a backbone; each sample runs through its expert's slice."""

    mixture: Mixture
    members: list[Member] = field(init=False)

    def __post_init__(self) -> None:
        self.members = [Member(self.student, architecture) for architecture in self.mixture.architectures]
        for index, member in enumerate(self.members):
            if self.config.deltas is not None:
                member.deltas = Deltas(member.model, self.config.deltas, self.seed, index, self.student.device)
            member.model.train()
            if self.config.gradient_checkpointing:
                member.model.enable_gradient_checkpointing()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return the backbone and the experts' deltas, by the names that checkpoints give them."""
        deltas = {f"deltas-{i}": member.deltas for i, member in enumerate(self.members) if member.deltas is not None}
        return {**super().modules, **deltas}

    def batch(self, step: int) -> NoisePlan:
        """Draw the batch of a step, sorted by architecture, so that a micro-batch holds few of them.

        With `experts_per_step`, draw that many experts, then the pairs of each from the pairs that it serves.
        """
        drawn = super().batch(step)
        experts, count = self.mixture.experts[self.pairs], self.config.experts_per_step
        if count is None or self.mixture.bins is not None:
            order = self.mixture.of(self.pairs[drawn.indices], drawn.timesteps).argsort(stable=True)
            return replace(drawn, **{name: values[order] for name, values in vars(drawn).items() if values is not None})
        served = experts[drawn.indices[:count]].sort().values  # drawn in proportion to their prompts
        parts = drawn.indices.tensor_split(len(served))
        indices = []
        for number, (expert, part) in enumerate(zip(served.tolist(), parts, strict=True)):
            pair_indices = (experts == expert).nonzero().flatten()
            rng = generator(self.seed, "expert", step, number)
            indices.append(pair_indices[torch.randint(len(pair_indices), (len(part),), generator=rng)])
        return replace(drawn, indices=torch.cat(indices))

    def micro_loss(self, batch: NoisePlan, positions: Tensor) -> dict[str, Tensor]:
        """Return the terms of Eq. 30, summed over `positions` and divided by the batch size."""
        experts = self.mixture.of(self.pairs[batch.indices[positions]], batch.timesteps[positions])
        terms: dict[str, Tensor] = {}
        for index in experts.unique().tolist():
            student = self.members[index].take()
            for name, term in self.terms(student, batch, positions[experts == index]).items():
                terms[name] = terms[name] + term if name in terms else term
        return terms
