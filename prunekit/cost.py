"""What an Architecture costs: MACs by convention, and parameters, exact to the integer and differentiable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from prunekit.errors import UserError

from .units import Architecture, UnitSpace, attention, depth, feedforward, resnet
from .units.counting import CONVENTIONS, ConvLinear, LayerCost, Parameters
from .units.discovery import kept_groups, match, width_group
from .units.space import near
from .units.walk import Site, resolutions, walk


class CostModel:
    """The cost of every Architecture over a space, at one latent size, batch 1; only shapes of the UNet are read.

    sample_size: of the latent, a side or (h, w); None: the UNet's own.
    text_length: tokens of the text.
    convention:
        "exact": convolutions, linear layers, QKᵀ and AV; equals torch's FlopCounterMode / 2 on the sliced UNet;
        "conv_linear": the weights of convolutions and linear layers alone;
        "aptp": the count behind the MACs that the APTP paper prints, which also charges biases, norms and SiLU,
            takes a text of one token, and charges cross-attention as if the text were as long as the image.
    """

    unit = "MACs"  # of what a budget counts

    def __init__(
        self,
        unet: UNet2DConditionModel,
        space: UnitSpace,
        sample_size: int | tuple[int, int] | None = None,
        text_length: int = 77,
        convention: str = "exact",
    ):
        if convention not in CONVENTIONS:
            raise UserError(
                f"convention={convention!r}: choose one of {', '.join(CONVENTIONS)}.{near(convention, CONVENTIONS)}"
            )
        match(unet, space)
        self.space = space
        self.sample_size = _latent_size(unet, sample_size)
        self.text_length = text_length
        self.convention = convention
        counter = CONVENTIONS[convention](text_length)
        self._macs = Polynomial(space, _layer_costs(unet, counter, self.sample_size))
        self._params = Polynomial(space, _layer_costs(unet, Parameters(), self.sample_size))
        self.dense_macs: int = self._macs.count(space.full().values)
        self.dense_params: int = self._params.count(space.full().values)

    def macs(self, architecture: Architecture | torch.Tensor) -> int | torch.Tensor:
        """MACs of one forward pass, batch 1.

        An int for a boolean Architecture (or a boolean (D,)); for soft gates (..., D) a tensor (...), their
        expectation where every gate is an independent coin, differentiable and equal to the int at 0 and 1. It has
        the gates' dtype: float64 holds every integer exactly.
        """
        return self._evaluate(self._macs, architecture)

    def params(self, architecture: Architecture | torch.Tensor) -> int | torch.Tensor:
        """The number of parameters of the sliced UNet; types as in `macs`."""
        return self._evaluate(self._params, architecture)

    def ratio(self, architecture: Architecture | torch.Tensor) -> float | torch.Tensor:
        """MACs as a share of the dense UNet's."""
        return self.macs(architecture) / self.dense_macs

    @property
    def dense_total(self) -> int:
        """What a budget is a share of: here the dense UNet's MACs."""
        return self.dense_macs

    def total(self, architecture: Architecture | torch.Tensor) -> int | torch.Tensor:
        """What a budget counts: here MACs; types as in `macs`."""
        return self.macs(architecture)

    def running(self, architecture: Architecture) -> RunningCost:
        """The `total` of a boolean Architecture whose units are then flipped one by one, in O(1) each."""
        return RunningCost(self._macs, self._vector(architecture))

    def marginal(self, architecture: Architecture) -> torch.Tensor:
        """Per unit, int64 (D,): how the `total` would change (signed) if that one unit were flipped."""
        running = self.running(architecture)
        return torch.tensor([running.change(unit) for unit in range(self.space.size)], dtype=torch.int64, device="cpu")

    def _vector(self, architecture: Architecture | torch.Tensor) -> torch.Tensor:
        if isinstance(architecture, Architecture):
            if architecture.space is not self.space:
                architecture = architecture.on(self.space)
            return architecture.values
        if architecture.shape[-1:] != (self.space.size,):
            raise UserError(f"gates have shape (..., {self.space.size}), got {tuple(architecture.shape)}")
        return architecture

    def _evaluate(self, polynomial: Polynomial, architecture: Architecture | torch.Tensor) -> int | torch.Tensor:
        values = self._vector(architecture)
        if values.dtype == torch.bool:
            return polynomial.count(values) if values.dim() == 1 else polynomial.expectation(values.double())
        return polynomial.expectation(values)


class Polynomial:
    """The sum over chains k of P_k · (always_k + sum over k's width groups g of a_g·n_g + b_g·[n_g > 0]).

    A chain is the set of depth units that a layer lies under, P_k the product of their gates; n_g is the number of
    kept units of a group. So the polynomial is linear in every gate alone once [n > 0] is 1 - prod(1 - gate).

    layers: (path, kind, units, cost) of everything in the UNet that costs something.
    """

    def __init__(self, space: UnitSpace, layers: Iterable[tuple[str, str, int, LayerCost]]):
        self.space = space
        groups = {(group.kind, group.path): index for index, group in enumerate(space.width_groups)}
        self.per_unit = [0] * len(groups)
        self.if_any = [0] * len(groups)
        self.chain_of_group = [0] * len(groups)
        chains: dict[tuple[int, ...], int] = {}
        always: list[int] = []
        for path, kind, full, cost in layers:
            chain = chains.setdefault(space.depth_units_over(path), len(chains))
            always += [0] * (len(chains) - len(always))
            always[chain] += cost.always
            group = groups.get((kind, path))
            if group is None:  # not a group of this space: it stays as it is
                always[chain] += cost.per_unit * full + cost.if_any
            else:
                self.per_unit[group], self.if_any[group] = cost.per_unit, cost.if_any
                self.chain_of_group[group] = chain
        self.chains = list(chains)
        self.always = always
        self._soft: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}

    def width_cost(self, group: int, kept: int) -> int:
        """What the width group of that index costs with `kept` units, its layer not being removed."""
        return self.per_unit[group] * kept + self.if_any[group] * (kept > 0)

    def count(self, values: torch.Tensor) -> int:
        """The exact integer for boolean values (D,)."""
        return RunningCost(self, values).total

    def expectation(self, gates: torch.Tensor) -> torch.Tensor:
        """The expectation (...) for soft gates (..., D)."""
        shape, dtype = gates.shape[:-1], gates.dtype
        gates = gates.reshape(shape.numel(), self.space.size)
        if dtype in (torch.float16, torch.bfloat16):
            gates = gates.float()
        tables = self._tables(gates.device, gates.dtype)
        widths, depths = gates[:, : self.space.num_width], gates[:, self.space.num_width :]  # (B, W), (B, U)
        per_chain = tables["always"] + self.inside(widths, tables)  # (B, K)
        depths = torch.cat([depths, depths.new_ones(len(depths), 1)], dim=1)
        for column in tables["chain_units"]:  # (K,): one depth unit of every chain, or the closing one
            per_chain = per_chain * depths.index_select(1, column)
        return per_chain.sum(dim=-1).to(dtype).reshape(shape)

    def inside(self, widths: torch.Tensor, tables: dict[str, torch.Tensor]) -> torch.Tensor:
        """What soft width gates (B, W) make each chain's layers cost, (B, K) float64."""
        kept = (widths @ tables["members"]).double()  # (B, G)
        per_chain = kept @ tables["per_unit"]
        if "if_any" in tables:
            closed = torch.cat([1 - widths, widths.new_ones(len(widths), 1)], dim=1)
            nonempty = 1 - closed[:, tables["units"]].prod(dim=-1)  # (B, G)
            per_chain = per_chain + nonempty.double() @ tables["if_any"]
        return per_chain

    def _tables(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        if (device, dtype) in self._soft:
            return self._soft[device, dtype]
        space, groups = self.space, self.space.width_groups
        with torch.device("cpu"):
            members = torch.zeros(space.num_width, len(groups), dtype=dtype)
            for index, group in enumerate(groups):
                members[space.slice(group), index] = 1
            in_chain = torch.zeros(len(groups), len(self.chains), dtype=torch.float64)
            in_chain[torch.arange(len(groups)), torch.tensor(self.chain_of_group, dtype=torch.long)] = 1
            longest = max(map(len, self.chains))
            padded = [list(chain) + [space.num_depth] * (longest - len(chain)) for chain in self.chains]
            tables = {
                "members": members,
                "always": torch.tensor(self.always, dtype=torch.float64),
                "per_unit": torch.tensor(self.per_unit, dtype=torch.float64)[:, None] * in_chain,
                "chain_units": torch.tensor(padded, dtype=torch.long).reshape(len(padded), longest).T.contiguous(),
            }
            if any(self.if_any):
                most = max(group.size for group in groups)
                units = torch.full((len(groups), most), space.num_width)
                for index, group in enumerate(groups):
                    units[index, : group.size] = torch.arange(space.slice(group).start, space.slice(group).stop)
                tables["units"] = units
                tables["if_any"] = torch.tensor(self.if_any, dtype=torch.float64)[:, None] * in_chain
            tables |= self.extra_tables(in_chain)
        self._soft[device, dtype] = {name: table.to(device) for name, table in tables.items()}
        return self._soft[device, dtype]

    def extra_tables(self, in_chain: torch.Tensor) -> dict[str, torch.Tensor]:
        """More constants for `inside`; in_chain (G, K) is 1 where a width group lies in a chain."""
        return {}


class RunningCost:
    """A cost that follows a boolean vector while units are flipped; made by `CostModel.running`.

    total: the cost now. bits: the vector now, a list of D booleans (read only).
    """

    def __init__(self, polynomial: Polynomial, values: torch.Tensor):
        if values.dtype != torch.bool:
            raise UserError("a running cost needs a boolean Architecture; decide first: architecture.threshold(0.5)")
        space = polynomial.space
        self.bits: list[bool] = values.tolist()
        self._num_width = space.num_width
        self._polynomial = polynomial
        self._group_of = [index for index, group in enumerate(space.width_groups) for _ in range(group.size)]
        self._kept = [sum(self.bits[space.slice(group)]) for group in space.width_groups]
        self._inside = list(polynomial.always)  # per chain, what it costs while all its depth units stay
        for group, kept in enumerate(self._kept):
            self._inside[polynomial.chain_of_group[group]] += polynomial.width_cost(group, kept)
        self._closed = [0] * len(polynomial.chains)
        self._chains_of: list[list[int]] = [[] for _ in range(space.num_depth)]
        for chain, units in enumerate(polynomial.chains):
            for unit in units:
                self._chains_of[unit].append(chain)
                self._closed[chain] += not self.bits[space.num_width + unit]
        self.total = sum(inside for inside, closed in zip(self._inside, self._closed, strict=True) if not closed)

    def change(self, unit: int) -> int:
        """How the total would change (signed) if this unit were flipped."""
        kept = self.bits[unit]
        if unit < self._num_width:
            group = self._group_of[unit]
            if self._closed[self._polynomial.chain_of_group[group]]:
                return 0
            count = self._kept[group]
            width_cost = self._polynomial.width_cost
            return width_cost(group, count + (-1 if kept else 1)) - width_cost(group, count)
        chains = self._chains_of[unit - self._num_width]
        if kept:
            return -sum(self._inside[chain] for chain in chains if self._closed[chain] == 0)
        return sum(self._inside[chain] for chain in chains if self._closed[chain] == 1)

    def flip(self, unit: int) -> int:
        """Flip a unit; returns the change of the total. Flipping twice undoes."""
        change, step = self.change(unit), -1 if self.bits[unit] else 1
        if unit < self._num_width:
            group = self._group_of[unit]
            chain, before = self._polynomial.chain_of_group[group], self._kept[group]
            self._kept[group] += step
            width_cost = self._polynomial.width_cost
            self._inside[chain] += width_cost(group, self._kept[group]) - width_cost(group, before)
        else:
            for chain in self._chains_of[unit - self._num_width]:
                self._closed[chain] -= step
        self.bits[unit] = not self.bits[unit]
        self.total += change
        return change


def _latent_size(unet: UNet2DConditionModel, sample_size: int | tuple[int, int] | None) -> tuple[int, int]:
    size = unet.config.sample_size if sample_size is None else sample_size
    if size is None:
        raise UserError("the UNet's config names no sample_size; pass the latent's: a side, or (height, width)")
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UserError(f"sample_size={sample_size!r}: pass a side of the latent, or (height, width)")
    return size


def _layer_costs(
    unet: UNet2DConditionModel, counter: ConvLinear, size: tuple[int, int]
) -> Iterator[tuple[str, str, int, LayerCost]]:
    """(path, kind, units, cost) of everything in the UNet that costs something."""
    positions = [height * width for height, width in resolutions(unet, size)]
    yield "", "stem", 0, LayerCost(always=_stem_cost(unet, counter, positions[0]))
    parent: nn.Module | None = None
    for site in walk(unet):
        if site.kind == "block":
            parent = site.module
            continue
        group = width_group(unet, site)
        yield site.path, site.kind, group.size if group else 0, _site_cost(unet, site, parent, counter, positions)


def _site_cost(
    unet: UNet2DConditionModel, site: Site, block: nn.Module | None, counter: ConvLinear, positions: list[int]
) -> LayerCost:
    here = positions[site.level]
    if site.kind == "resnet":
        return resnet.cost(site.module, counter, here)
    if site.kind == "attention":
        norm = getattr(block, attention.NORM_OF[site.path.rpartition(".")[2]])
        return attention.cost(site.module, norm, counter, here)
    if site.kind == "feedforward":
        return feedforward.cost(site.module, block.norm3, counter, here, kept_groups(unet, site.path))
    if site.kind == "transformer":
        return depth.transformer_cost(site.module, counter, here)
    return LayerCost(always=sum(counter.conv(site.module.conv, here)))  # a downsampler or upsampler


def _stem_cost(unet: UNet2DConditionModel, counter: ConvLinear, positions: int) -> int:
    """The convolutions at both ends, the last norm, and the embeddings of the time step and (SDXL) of the sizes."""
    total = sum(counter.conv(unet.conv_in, positions)) + sum(counter.conv(unet.conv_out, positions))
    total += counter.norm(unet.conv_norm_out, positions) + counter.silu(unet.conv_norm_out.num_channels, positions)
    for embedding in (unet.time_embedding, getattr(unet, "add_embedding", None)):
        if embedding is not None:
            total += sum(counter.linear(embedding.linear_1, 1)) + sum(counter.linear(embedding.linear_2, 1))
            total += counter.silu(embedding.linear_1.out_features, 1)
    return total
