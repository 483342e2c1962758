"""UnitGroup, UnitSpace and Architecture. They are plain data without references to modules, so all can be saved.

Tensors are created on an explicit device, because a model may be built, and examined, under `torch.device("meta")`.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prunekit.runtime.errors import UserError
from prunekit.runtime.files import write_text

DEPTH_KINDS = ("layer", "block", "stage")
FORMAT = 1


@dataclass(frozen=True)
class UnitGroup:
    """A set of similar parts of a denoiser that can be removed one by one (width) or as a whole (depth, one unit).

    Args:
        kind: width: such as "attention" (heads), "feedforward" (channel groups), "resnet" (GroupNorm groups); depth:
            "layer", "block" (a transformer block), "stage" (several blocks).
        path: path of the module in the model; a stage is named by its first block.
        size: number of units.
        channels: width: channels per unit at the gate; depth: channels of the hidden state that enters.
        covers: depth only: paths of the modules that are removed with the unit.

    """

    kind: str
    path: str
    size: int
    channels: int
    covers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return kind and path, joined by a colon, unique in a space."""
        return f"{self.kind}:{self.path}"

    @property
    def is_depth(self) -> bool:
        """Return whether this is one whole layer, block or stage."""
        return self.kind in DEPTH_KINDS

    def removes(self, path: str) -> bool:
        """Return whether this depth unit removes the module at `path`."""
        return path in self.covers or path.startswith(self._inside)

    @functools.cached_property
    def _inside(self) -> tuple[str, ...]:
        """The prefixes of the paths of all modules inside the covers."""
        return tuple(cover + "." for cover in self.covers)


class UnitSpace:
    """The ordered list of a denoiser's UnitGroups: D units, widths first, depths last.

    Width groups are in the order of a forward pass, and so are depth groups; stages are last, outermost first.
    """

    def __init__(self, groups: Iterable[UnitGroup]):
        self.groups: tuple[UnitGroup, ...] = tuple(groups)
        kinds = [group.is_depth for group in self.groups]
        assert kinds == sorted(kinds), "widths come first, depths last"
        self._by_name = {group.name: index for index, group in enumerate(self.groups)}
        assert len(self._by_name) == len(self.groups), "group names are unique"
        self._slices: list[slice] = []
        start = 0
        for group in self.groups:
            self._slices.append(slice(start, start + group.size))
            start += group.size
        self.size = start
        self.num_depth = sum(group.size for group in self.groups if group.is_depth)
        self.num_width = self.size - self.num_depth
        self.depth_groups = tuple(group for group in self.groups if group.is_depth)
        self.width_groups = tuple(group for group in self.groups if not group.is_depth)
        self._under = [self._positions_under(group) for group in self.depth_groups]  # (K,) per depth unit

    def _positions_under(self, depth_group: UnitGroup) -> torch.Tensor:
        positions = [
            position
            for group in self.groups
            if group is not depth_group and depth_group.removes(group.path)
            for position in range(self.slice(group).start, self.slice(group).stop)
        ]
        return torch.tensor(positions, dtype=torch.long, device="cpu")

    def slice(self, group: UnitGroup | str) -> slice:
        """Return the slice of a group, given by itself or by name, in a vector over this space."""
        name = group if isinstance(group, str) else group.name
        if name not in self._by_name:
            raise UserError(f"no group {name!r} in this space.{near(name, self._by_name)}")
        return self._slices[self._by_name[name]]

    def group(self, name: str) -> UnitGroup:
        """Return the group with this name."""
        self.slice(name)
        return self.groups[self._by_name[name]]

    def depth_units_over(self, path: str, kind: str | None = None) -> tuple[int, ...]:
        """Return the depth units (0 .. num_depth-1) whose removal also removes the module at `path`, in order.

        kind: kind of the group at `path`; if it is a depth group, it is left out of the result.
        """
        return tuple(
            index
            for index, group in enumerate(self.depth_groups)
            if group.removes(path) and not (kind in DEPTH_KINDS and group.path == path)
        )

    def full(self) -> Architecture:
        """Return the Architecture that keeps every unit."""
        return Architecture(self, torch.ones(self.size, dtype=torch.bool, device="cpu"))

    def random(self, keep: float = 0.7, seed: int = 0) -> Architecture:
        """Return an Architecture that keeps each unit with probability `keep`, drawn from `seed`."""
        generator = torch.Generator("cpu").manual_seed(seed)
        return Architecture(self, torch.rand(self.size, generator=generator, device="cpu") < keep)

    def canonical(self, values: torch.Tensor) -> torch.Tensor:
        """Return a copy of `values` (D,) in which every unit under a removed depth unit is zero."""
        values = values.clone()
        for index, positions in enumerate(self._under):
            if values[self.num_width + index] == 0:
                values[positions] = 0
        return values

    def difference(self, other: UnitSpace) -> str | None:
        """Return one line that names the first difference to another space, or None if there is none."""
        mine = {group.name: group for group in self.groups}
        theirs = {group.name: group for group in other.groups}
        for name, group in theirs.items():
            if name not in mine:
                return f"{name!r} is missing here"
            if mine[name] != group:
                return (
                    f"{name!r} has {mine[name].size} units of {mine[name].channels} channels here, "
                    f"{group.size} of {group.channels} there"
                )
        for name in mine:
            if name not in theirs:
                return f"{name!r} is only here"
        return None if self.groups == other.groups else "the groups have another order"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form, which `from_dict` reads."""
        return {"format": FORMAT, "groups": [asdict(group) for group in self.groups]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UnitSpace:
        """Return the space that `to_dict` wrote."""
        check_format(data, "a UnitSpace")
        return cls(UnitGroup(**{**group, "covers": tuple(group["covers"])}) for group in data["groups"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnitSpace) and self.groups == other.groups

    def __hash__(self) -> int:
        return hash(self.groups)

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"UnitSpace({self.num_width} width + {self.num_depth} depth = {self.size} units)"


class Architecture:
    """The kept units of a UnitSpace: a vector (D,), boolean, or soft in [0, 1] during learning.

    Units under a removed layer are ignored: equality, hash and the saved form are canonical.
    """

    def __init__(self, space: UnitSpace, values: torch.Tensor | Sequence[float]):
        values = torch.as_tensor(values, device="cpu").detach()
        if values.shape != (space.size,):
            raise UserError(f"an Architecture of this space has {space.size} values, got {tuple(values.shape)}")
        if values.dtype != torch.bool:
            if not values.is_floating_point():
                raise UserError(f"an Architecture's values are boolean or floating point, got {values.dtype}")
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise UserError("an Architecture's soft values are in [0, 1]")
        self.space = space
        self.values = values.clone()

    @property
    def is_boolean(self) -> bool:
        """Return whether the Architecture is boolean."""
        return self.values.dtype == torch.bool

    @functools.cached_property
    def canonical(self) -> torch.Tensor:
        """The values (D,) with every unit under a removed layer at zero."""
        return self.space.canonical(self.values)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return the values of one group, by its name."""
        return self.values[self.space.slice(name)]

    def kept(self, name: str) -> list[int]:
        """Return the indices of a group's kept units (boolean only)."""
        self._need_boolean()
        return self.canonical[self.space.slice(name)].nonzero().flatten().tolist()

    def removed(self) -> tuple[UnitGroup, ...]:
        """Return the removed depth groups, except those under another removed group (boolean only)."""
        self._need_boolean()
        gone = [group for group in self.space.depth_groups if not bool(self[group.name])]
        return tuple(
            group for group in gone if not any(other is not group and other.removes(group.path) for other in gone)
        )

    def threshold(self, at: float) -> Architecture:
        """Return the boolean Architecture of the values above `at`."""
        return Architecture(self.space, self.values > at)

    def on(self, space: UnitSpace) -> Architecture:
        """Return the same Architecture over another instance of the space; raise ValueError if the spaces differ."""
        difference = space.difference(self.space)
        if difference:
            raise UserError(f"this Architecture belongs to another space: {difference}")
        return Architecture(space, self.values)

    def describe(self) -> list[dict[str, Any]]:
        """Return a row per group, in order: name, kind, path, block, kept (a sum, if soft), total, removed.

        removed: whether a removed depth group contains the group.
        """
        values, rows = self.canonical, []
        for group in self.space.groups:
            over = self.space.depth_units_over(group.path, group.kind)
            depth = self.values[self.space.num_width :]
            kept = values[self.space.slice(group)].sum().item()
            rows.append(
                {
                    "name": group.name,
                    "kind": group.kind,
                    "path": group.path,
                    "block": block_of(group.path),
                    "kept": kept,
                    "total": group.size,
                    "removed": any(depth[index] == 0 for index in over),
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form by names of groups, which `from_dict` reads."""
        values = self.canonical
        by_name = {group.name: values[self.space.slice(group)] for group in self.space.groups}
        if self.is_boolean:
            units = {name: part.nonzero().flatten().tolist() for name, part in by_name.items()}
        else:
            units = {name: part.tolist() for name, part in by_name.items()}
        key = "kept" if self.is_boolean else "values"
        return {"format": FORMAT, "space": self.space.to_dict(), key: units}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], space: UnitSpace | None = None) -> Architecture:
        """Return the Architecture that `to_dict` wrote; `space`, if given, must be its space."""
        check_format(data, "an Architecture")
        stored_space = UnitSpace.from_dict(data["space"])
        if "kept" in data:
            values = torch.zeros(stored_space.size, dtype=torch.bool, device="cpu")
            for name, kept in data["kept"].items():
                values[stored_space.slice(name)][kept] = True
        else:
            values = torch.zeros(stored_space.size, dtype=torch.float64, device="cpu")
            for name, part in data["values"].items():
                values[stored_space.slice(name)] = torch.tensor(part, dtype=torch.float64, device="cpu")
            values = values.float()
        architecture = cls(stored_space, values)
        return architecture if space is None else architecture.on(space)

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON, the whole file or nothing."""
        write_text(Path(path), json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path, space: UnitSpace | None = None) -> Architecture:
        """Return the Architecture that `save` wrote; `space`, if given, must be its space."""
        return cls.from_dict(json.loads(Path(path).read_text()), space)

    def _need_boolean(self) -> None:
        if not self.is_boolean:
            raise UserError("this Architecture is soft; make it boolean first: architecture.threshold(0.5)")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Architecture)
            and self.space == other.space
            and self.values.dtype == other.values.dtype
            and torch.equal(self.canonical, other.canonical)
        )

    def __hash__(self) -> int:
        return hash((self.space, self.is_boolean, tuple(self.canonical.tolist())))

    def __repr__(self) -> str:
        form = "boolean" if self.is_boolean else "soft"
        return f"Architecture({form}, keeps {self.canonical.sum().item():g} of {self.space.size} units)"


def block_of(path: str) -> str:
    """Return the path of a module's block: the first name of the module's path, plus a list index if one follows."""
    parts = path.split(".")
    return ".".join(parts[: 2 if parts[1:] and parts[1].isdigit() else 1])


def check_format(data: Mapping[str, Any], what: str) -> None:
    """Raise UserError for a saved form with a format that this version does not read."""
    if data.get("format") != FORMAT:
        raise UserError(
            f"this is not {what} of format {FORMAT} (format: {data.get('format')!r}); "
            "it was written by another version of prunekit"
        )


def near(name: str, names: Iterable[str]) -> str:
    """Return ` Near names: …` for the end of an error: up to 3 similar names, else the first 3; "" without names."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    return f" Near names: {', '.join(close)}" if close else ""
