"""The cost of an Architecture: MACs by convention, and parameters; exact to the integer and differentiable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, overload

import torch
from torch import nn

from prunekit.runtime.errors import UserError

from .axes import Axis, Layer, weight_of
from .counting import CONVENTIONS, Counter, LayerCost, Parameters
from .denoiser import Denoiser
from .discovery import match
from .emptied import Emptied
from .registry import denoiser_of
from .space import Architecture, UnitSpace, near


class CostModel:
    """Cost of every Architecture over a space, at one latent size and batch 1. Only the model's shapes are read.

    Args:
        model: the denoiser, which may be on the meta device.
        space: the denoiser's units.
        sample_size: side of the latent, or (h, w); None: the size in the model's config.
        text_length: number of text tokens.
        convention: "exact": convolutions, linear layers, QKᵀ and AV; equals torch's FlopCounterMode / 2 on the sliced
            model. "conv_linear": only the weights of convolutions and linear layers. "aptp" (UNets): the count behind
            the MACs in the APTP paper, which also charges biases, norms and SiLU, assumes a text of one token, and
            charges cross-attention as if the text were as long as the image.

    """

    unit = "MACs"  # unit of a budget

    def __init__(
        self,
        model: nn.Module,
        space: UnitSpace,
        sample_size: int | tuple[int, int] | None = None,
        text_length: int = 77,
        convention: str = "exact",
    ):
        denoiser = denoiser_of(model)
        conventions = {**CONVENTIONS, **denoiser.conventions}
        if convention not in conventions:
            raise UserError(
                f"convention={convention!r}: choose one of {', '.join(conventions)}.{near(convention, conventions)}"
            )
        match(model, space)
        self.space = space
        self.sample_size = _latent_size(denoiser, model, sample_size)
        self.text_length = text_length
        self.convention = convention
        counter = conventions[convention]()
        lengths = denoiser.lengths(model, self.sample_size, counter.text_length(text_length))
        layers = _parts_of_layers(denoiser, model)
        self._macs = Polynomial(space, _layer_costs(layers, counter, lengths))
        self._params = Polynomial(space, _layer_costs(layers, Parameters(), lengths))
        self.dense_macs: int = self._macs.count(space.full().values)
        self.dense_params: int = self._params.count(space.full().values)

    @overload
    def macs(self, architecture: Architecture) -> int: ...
    @overload
    def macs(self, architecture: torch.Tensor) -> int | torch.Tensor: ...
    def macs(self, architecture: Architecture | torch.Tensor) -> int | torch.Tensor:
        """Return the MACs of one forward pass, batch 1: an integer for a boolean Architecture or a boolean tensor (D,).

        For other tensors, return the result of `expected_macs`.

        Raises:
            UserError: a soft Architecture.

        """
        return self._evaluate(self._macs, architecture)

    def expected_macs(self, gates: torch.Tensor) -> torch.Tensor:
        """Return the expected MACs (...) for gates (..., D), each the probability that its unit stays, independently.

        The result is differentiable, and equals the integer count where all gates are 0 or 1. It has the gates' dtype
        (float64 for boolean gates); float64 holds every integer count exactly.
        """
        return self._expectation(self._macs, gates)

    @overload
    def params(self, architecture: Architecture) -> int: ...
    @overload
    def params(self, architecture: torch.Tensor) -> int | torch.Tensor: ...
    def params(self, architecture: Architecture | torch.Tensor) -> int | torch.Tensor:
        """Return the number of parameters of the sliced model; types as in `macs`."""
        return self._evaluate(self._params, architecture)

    @overload
    def ratio(self, architecture: Architecture) -> float: ...
    @overload
    def ratio(self, architecture: torch.Tensor) -> float | torch.Tensor: ...
    def ratio(self, architecture: Architecture | torch.Tensor) -> float | torch.Tensor:
        """Return the MACs as a share of the dense model's; types as in `macs`."""
        return self._evaluate(self._macs, architecture) / self.dense_macs

    @property
    def dense_total(self) -> int:
        """The dense model's `total`, which a budget is a fraction of; here its MACs."""
        return self.dense_macs

    @overload
    def total(self, architecture: Architecture) -> int: ...
    @overload
    def total(self, architecture: torch.Tensor) -> int | torch.Tensor: ...
    def total(self, architecture: Architecture | torch.Tensor) -> int | torch.Tensor:
        """Return the quantity that a budget limits, here MACs; types as in `macs`."""
        return self._evaluate(self._budgeted, architecture)

    def expected_total(self, gates: torch.Tensor) -> torch.Tensor:
        """Return the expectation of `total` for soft gates; shapes and dtypes as in `expected_macs`."""
        return self._expectation(self._budgeted, gates)

    def running(self, architecture: Architecture) -> RunningCost:
        """Return the `total` of a boolean Architecture as a `RunningCost`, which flips single units in O(1)."""
        return RunningCost(self._budgeted, self._vector(architecture))

    def marginal(self, architecture: Architecture) -> torch.Tensor:
        """Return the signed change of `total` for flipping each unit alone, int64 (D,)."""
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

    @property
    def _budgeted(self) -> Polynomial:
        """The polynomial that `total` evaluates."""
        return self._macs

    def _evaluate(self, polynomial: Polynomial, architecture: Architecture | torch.Tensor) -> int | torch.Tensor:
        values = self._vector(architecture)
        if isinstance(architecture, Architecture) or (values.dtype == torch.bool and values.dim() == 1):
            return polynomial.count(values)
        return self._expectation(polynomial, values)

    def _expectation(self, polynomial: Polynomial, gates: torch.Tensor) -> torch.Tensor:
        values = self._vector(gates)
        return polynomial.expectation(values.double() if values.dtype == torch.bool else values)


class Polynomial:
    """The sum over chains k of P_k · (always_k + sum over k's width groups g of a_g·n_g + b_g·[n_g > 0]).

    A chain is the set of depth units that a layer lies under, and P_k is the product of their gates. n_g is the number
    of kept units of a group; a_g and b_g are its costs `per_unit` and `if_any`. The polynomial is linear in each single
    gate, because [n > 0] is computed as 1 - prod(1 - gate).

    layers: (path, kind, number of units, cost) of every layer that has a cost.
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
            if group is None:  # not a group of this space: all its units stay
                always[chain] += cost.per_unit * full + cost.if_any
            else:
                self.per_unit[group], self.if_any[group] = cost.per_unit, cost.if_any
                self.chain_of_group[group] = chain
        self.chains = list(chains)
        self.always = always
        self._soft: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}

    def width_cost(self, group: int, kept: int) -> int:
        """Return the cost of the width group with index `group` with `kept` units, if its layer is not removed."""
        return self.per_unit[group] * kept + self.if_any[group] * (kept > 0)

    def count(self, values: torch.Tensor) -> int:
        """Return the exact integer cost for boolean values (D,)."""
        return RunningCost(self, values).total

    def expectation(self, gates: torch.Tensor) -> torch.Tensor:
        """Return the expected cost (...) for soft gates (..., D)."""
        shape, dtype = gates.shape[:-1], gates.dtype
        gates = gates.reshape(shape.numel(), self.space.size)
        if dtype in (torch.float16, torch.bfloat16):
            gates = gates.float()
        tables = self._tables(gates.device, gates.dtype)
        widths, depths = gates[:, : self.space.num_width], gates[:, self.space.num_width :]  # (B, W), (B, U)
        per_chain = tables["always"] + self.inside(widths, tables)  # (B, K)
        depths = torch.cat([depths, depths.new_ones(len(depths), 1)], dim=1)
        for column in tables["chain_units"]:  # (K,): one depth unit of every chain, or the last column, which is 1
            per_chain = per_chain * depths.index_select(1, column)
        return per_chain.sum(dim=-1).to(dtype).reshape(shape)

    def inside(self, widths: torch.Tensor, tables: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the cost of each chain's width groups, (B, K) float64, for soft width gates (B, W)."""
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
        """Return more constants for `inside`; in_chain (G, K) is 1 where a width group lies in a chain."""
        return {}


class RunningCost:
    """The cost of a boolean vector, updated as units are flipped; made by `CostModel.running`.

    total: current cost.
    bits: current vector, a list of D booleans (read only).
    """

    def __init__(self, polynomial: Polynomial, values: torch.Tensor):
        if values.dtype != torch.bool:
            raise UserError(
                "an exact cost needs a boolean Architecture; make it boolean first: architecture.threshold(0.5)"
            )
        space = polynomial.space
        self.bits: list[bool] = values.tolist()
        self._num_width = space.num_width
        self._polynomial = polynomial
        self._group_of = [index for index, group in enumerate(space.width_groups) for _ in range(group.size)]
        self._kept = [sum(self.bits[space.slice(group)]) for group in space.width_groups]
        self._inside = list(polynomial.always)  # per chain: its cost if all its depth units stay
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
        """Return the signed change of the total if this unit were flipped."""
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
        """Flip a unit and return the change of the total. A second flip undoes the first."""
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


def _latent_size(denoiser: Denoiser, model: nn.Module, sample_size: int | tuple[int, int] | None) -> tuple[int, int]:
    size = denoiser.latent_size(model) if sample_size is None else sample_size
    if size is None:
        raise UserError(
            "the model's config has no sample_size; pass sample_size: the latent's side, or (height, width)"
        )
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"sample_size={sample_size!r}: pass the side of the latent, or (height, width)")
    return sides


class _Part(NamedTuple):
    """A module of a layer, and which units its cost depends on.

    owner: "unit": the layer's units together own the fraction `share`, (numerator, denominator), of the weight's cost,
        and of the bias's cost unless the module makes the layer's output; "any": the module feeds the layer and costs
        while any unit is left; "always": its cost is constant.
    rest: whether the part is also charged for the channels of the weight that no unit owns, and for an output's bias.
        Where several layers own channels of one weight, only the first layer's part is.
    owned: number of the weight's channels that units of any layer own.
    """

    module: nn.Module
    stream: str
    owner: Literal["unit", "any", "always"] = "always"
    share: tuple[int, int] = (0, 1)
    makes_output: bool = False
    rest: bool = True
    owned: int = 0


_Entry = tuple[Layer, list[_Part]]


def _parts_of_layers(denoiser: Denoiser, model: nn.Module) -> list[_Entry]:
    """Return every layer with the modules charged to it: those with parameters in no inner layer, and its feeds."""
    layers: list[_Entry] = [(layer, []) for layer in denoiser.layers(model)]
    at: dict[str, _Entry] = {}
    for entry in layers:
        at.setdefault(entry[0].path, entry)
    fed = {path: entry for entry in layers for path in entry[0].feeds}
    owned: dict[str, list[tuple[_Entry, Axis]]] = {}
    for entry in layers:
        for axis in entry[0].axes:
            owned.setdefault(entry[0].place(axis), []).append((entry, axis))
    for path, module in model.named_modules():
        if not module._parameters:
            continue
        if path in fed:
            layer, parts = fed[path]
            parts.append(_Part(module, layer.stream, "any"))
        elif path in owned:
            _add_owned(module, path, owned[path])
        else:
            inside = path
            while inside not in at:
                inside = inside.rpartition(".")[0]
            layer, parts = at[inside]
            parts.append(_Part(module, layer.stream_of(path[len(inside) + 1 :] if inside else path)))
    return layers


def _add_owned(module: nn.Module, path: str, axes: list[tuple[_Entry, Axis]]) -> None:
    """Charge a module, in whose weight units own channels, to the layers of these units."""
    sides = {axis.side == "in" for _, axis in axes}
    assert len(sides) == 1, f"the axes of {path} lie on one side of its weight"
    is_input = sides.pop()
    entries, sizes = list({id(entry): entry for entry, _ in axes}.values()), dict[int, int]()
    for (layer, parts), axis in axes:
        sizes[id(parts)] = sizes.get(id(parts), 0) + axis.copies * layer.units.size * layer.units.channels
    total = weight_of(module).shape[int(is_input)]
    for index, (layer, parts) in enumerate(entries):
        stream = layer.stream_of(path[len(layer.path) + 1 :])
        share = (sizes[id(parts)], total)
        parts.append(_Part(module, stream, "unit", share, is_input, index == 0, sum(sizes.values())))


def _layer_costs(
    layers: Iterable[_Entry], counter: Counter, lengths: Mapping[str, int]
) -> Iterator[tuple[str, str, int, LayerCost]]:
    """Yield (path, kind, number of units, cost) of every layer that has a cost."""
    for layer, parts in layers:
        if parts or layer.activations:
            units = layer.group.size if layer.group else 0
            yield layer.path, layer.kind, units, _cost(layer, parts, counter, lengths)


def _cost(layer: Layer, parts: Iterable[_Part], counter: Counter, lengths: Mapping[str, int]) -> LayerCost:
    """Return the cost of one layer. Its output bias costs while any unit is left, or always if the counter says so."""
    costs = {"unit": 0, "any": 0, "always": 0}
    for part in parts:
        if isinstance(part.module, Emptied):
            costs["always"] += sum(map(counter.emptied, part.module._parameters.values()))
            continue
        if part.stream not in lengths:
            kind = type(part.module).__name__
            raise UserError(f"a {kind} in {layer.path or 'the model'} belongs to no described layer: not supported")
        if part.module._parameters.keys() <= layer.tables:
            costs["always"] += sum(map(counter.table, part.module._parameters.values()))
            continue
        weights, bias = counter.module(part.module, lengths[part.stream])
        if part.owner != "unit":
            costs[part.owner] += weights + bias
            continue
        if not part.makes_output:
            weights, bias = weights + bias, 0  # each channel that a unit owns has an entry in the bias
        of, in_all = part.share
        owned, rest = divmod(weights * of, in_all)
        assert rest == 0
        costs["unit"] += owned
        if part.rest:
            costs["always"] += weights * (in_all - part.owned) // in_all
            costs["always" if counter.output_bias_stays else "any"] += bias
    for activation in layer.activations:
        costs[activation.needed] += counter.activation(activation.channels, lengths[activation.stream])
    if layer.group is None:
        return LayerCost(always=sum(costs.values()))
    if layer.products is not None:
        inner = layer.group.size * layer.group.channels
        costs["unit"] += counter.attention(inner, layer.group.size, *(lengths[stream] for stream in layer.products))
    per_unit, rest = divmod(costs["unit"], layer.group.size)
    assert rest == 0, f"the units of {layer.path} cost alike"
    return LayerCost(per_unit, costs["any"], costs["always"])
