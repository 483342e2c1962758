"""The part of a description that most denoisers share: lists of blocks that pass hidden states on by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from prunekit.runtime.errors import UserError

from .axes import Layer, Passage, Place
from .call import NamedCalls
from .counting import Counter
from .emptied import EmptiedLayer
from .family import Family
from .modulation import Modulation
from .renumbering import fewer_layers, rebuilt
from .slicing import PrunedModel, blank_of, dense_config, hollow, pruned_class, share_tables
from .space import UnitGroup

HIDDEN = "hidden_states"  # the argument of a block that holds the image's hidden states
MOST = 2**20  # largest allowed value of any size in a config
MOST_BLOCKS = 1000  # largest allowed number of blocks in a list


class Bypassed(nn.Module):
    """A module in place of a removed block; it returns the block's inputs in the order of the block's outputs.

    It keeps the block's boolean and integer attributes, which a ControlNet may read.
    """

    def __init__(self, block: nn.Module, inputs: Sequence[str]):
        super().__init__()
        self.names = list(inspect.signature(block.forward).parameters)
        self.inputs = tuple(inputs)
        for name, value in vars(block).items():
            if isinstance(value, bool | int) and name not in vars(self):
                setattr(self, name, value)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Return the inputs to pass on: one, or a tuple of several."""
        given = {**dict(zip(self.names, arguments, strict=False)), **named}
        passing = tuple(given[name] for name in self.inputs)
        return passing[0] if len(passing) == 1 else passing


class Description(NamedCalls):
    """The `Denoiser` of a model with lists of blocks; a subclass describes a block's layers and the streams' lengths.

    dense: the model class.
    lists: the paths of the lists of blocks, in the order of the forward pass.
    inputs: the arguments of a block that are passed on if it is removed, in the order of its outputs.
    outputs: by kind of layer, the path, inside the layer, of the output layer whose bias remains when the layer is
        emptied.
    tables, modulation: see `Structure`.
    layers_in_config: the config settings that hold the number of blocks of each list, in the order of `lists`; lists
        may share one setting. With them, a model that lost only whole blocks has a stock config (`stock`).
    indices_in_config: config settings that hold indices of blocks in the first list.
    """

    dense: ClassVar[type[nn.Module]]
    family: ClassVar[Family]
    lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    inputs: ClassVar[tuple[str, ...]] = (HIDDEN,)
    arguments: ClassVar[Mapping[str, str]] = {
        "noisy": "hidden_states",
        "timestep": "timestep",
        "text": "encoder_hidden_states",
        "pooled": "pooled_projections",
    }
    outputs: ClassVar[Mapping[str, str]] = {}
    tables: ClassVar[tuple[str, ...]] = ()
    modulation: ClassVar[Modulation | None] = None
    layers_in_config: ClassVar[tuple[str, ...]] = ("num_layers",)
    indices_in_config: ClassVar[tuple[str, ...]] = ()
    policies: ClassVar[tuple[str, ...]] = ("all", "none", "aptp")  # APTP's rule is for UNets; here it means all
    richest: ClassVar[str] = "all"
    conventions: ClassVar[Mapping[str, type[Counter]]] = {}
    legend: ClassVar[str] = "B: transformer block"

    def stem(self, model: Any) -> Layer:
        """Return the layer for everything outside the blocks."""
        raise NotImplementedError

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """Return the layers of one block, starting with the block itself."""
        raise NotImplementedError

    def lengths(self, model: Any, latent: tuple[int, int], text_length: int) -> dict[str, int]:
        """Return the number of positions of every stream."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """Raise UserError for a model on which the laws have not been verified; by default, accept every model."""

    # structure

    def blocks(self, model: Any, inner: bool = True) -> dict[str, nn.Module]:
        """Return the live blocks, by path."""
        return {
            f"{name}.{index}": block
            for name in self.lists
            for index, block in enumerate(model.get_submodule(name))
            if not isinstance(block, Bypassed)
        }

    def passing(self, path: str) -> tuple[str, ...]:
        """Return the arguments to pass on if the block at a path is removed: `inputs`, if all blocks are alike."""
        return self.inputs

    def hidden(self, output: Any) -> Tensor:
        """Return the image's hidden states: the output, or from a tuple the item at their index in `inputs`."""
        is_joint = isinstance(output, tuple)
        return output[self.inputs.index(HIDDEN)] if is_joint else output

    def regions(self, model: Any) -> list[nn.Module]:
        """Return the blocks, which are compiled separately."""
        return list(self.blocks(model).values())

    def layers(self, model: Any) -> list[Layer]:
        """Return every live layer, starting with the stem."""
        inside = [layer for path, block in self.blocks(model).items() for layer in self.inside(model, path, block)]
        return [self.stem(model), *inside]

    def groups(self, model: Any, policy: str) -> list[UnitGroup]:
        """Return the groups of all layers, then every block unless the policy is "none"."""
        widths = [layer.group for layer in self.layers(model) if layer.group is not None]
        paths = () if policy == "none" else self.blocks(model)
        return widths + [UnitGroup("block", path, 1, self.width(model), (path,)) for path in paths]

    def width(self, model: Any) -> int:
        """Return the number of channels of the hidden states that enter a block."""
        return int(model.inner_dim)

    def passage(self, model: Any, group: UnitGroup) -> Passage:
        """Return the passage of a block: its inputs by name."""
        return Passage(group.path, group.path, self.passing(group.path))

    def after_cut(self, model: Any, layer: Layer, kept: Sequence[int]) -> None:
        """Update the widths that modules store; by default they store none."""

    def empty(self, model: Any, layer: Layer) -> None:
        """Replace a layer by its output bias."""
        module = model.get_submodule(layer.path)
        model.set_submodule(layer.path, EmptiedLayer(module, self.outputs[layer.kind]))

    def bypass(self, model: Any, group: UnitGroup) -> None:
        """Replace each covered block by a module that passes its inputs on."""
        for path in group.covers:
            model.set_submodule(path, Bypassed(model.get_submodule(path), self.passing(path)))

    def outline(self, model: Any) -> dict[str, Place]:
        """Return the blocks' places in a diagram: rows of up to eight blocks, one below another."""
        return {path: Place("left", index // 8, "B") for index, path in enumerate(self.blocks(model))}

    def pruned_class(self) -> type[PrunedModel]:
        """Return the class of the pruned models; it is made once."""
        dense: Any = self.dense
        return pruned_class(dense, self)

    def class_source(self) -> tuple[list[tuple[str, str]], str]:
        """Return the description class, the function that makes the pruned class, and the statement that calls it."""
        own, make = type(self), pruned_class
        made = f"{make.__name__}({self.dense.__name__}, {own.__name__}(), __name__)"
        roots = [(item.__module__, item.__name__) for item in (own, make)]
        return roots, f"{self.pruned_class().__name__} = {made}"

    def stock(self, model: Any) -> Any:
        """Return a dense model itself, or a model that lost only whole blocks as a shorter dense model; else None."""
        if not isinstance(model, PrunedModel):
            return model
        live: dict[str, list[int]] = {name: [] for name in self.lists}
        for path in self.blocks(model):
            name, _, index = path.rpartition(".")
            live[name].append(int(index))
        config = fewer_layers(dense_config(model), live, self.layers_in_config, self.indices_in_config)
        sources = {f"{name}.{new}": f"{name}.{old}" for name, kept in live.items() for new, old in enumerate(kept)}
        sources |= {name: name for name, _ in model.named_children() if name not in live}
        return None if config is None else rebuilt(self, self.dense, config, sources, model)

    def blank(self, model: Any) -> Any:
        """Return a dense model of the same config, on the meta device."""
        return blank_of(self.dense, model)

    def from_config(self, config: Mapping[str, Any], name: str | Path) -> Any:
        """Build a model, stock or pruned, on the meta device and in evaluation mode."""
        self.check_config(config, name)
        kind: Any = self.pruned_class() if "pruning" in config else self.dense
        model = hollow(kind, config, f"the {self.dense.__name__} of {name}")
        self.check(model)
        return model.eval()

    def fill_tables(self, model: Any) -> None:
        """Take the tables from a small model on the CPU: they do not depend on the number of blocks."""
        if self.tables:
            small = self.dense(**{**dense_config(model), **dict.fromkeys(self.layers_in_config, 1)})
            share_tables(self, small, model)

    def check_config(self, config: Mapping[str, Any], name: str | Path) -> None:
        """Raise UserError for a config with invalid sizes, or sizes so large that building its model would not end."""
        known = inspect.signature(self.dense.__init__).parameters
        for key, value in config.items():
            if key not in known or isinstance(value, bool):
                continue
            most = MOST_BLOCKS if key in self.layers_in_config else MOST
            for size in value if isinstance(value, list | tuple) else [value]:
                if isinstance(size, int) and not 0 <= size <= most:
                    raise UserError(
                        f"the {self.dense.__name__} of {name} is not supported: {key} has {size!r}, "
                        f"not an integer from 0 to {most}"
                    )
