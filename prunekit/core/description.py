"""The part of a description that most denoisers share: lists of blocks that pass their hidden states on by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .axes import Layer, Passage, Place
from .call import Call, Fill
from .counting import Counter
from .emptied import EmptiedLayer
from .family import Family
from .slicing import PrunedModel, pruned_class
from .space import UnitGroup

TIMESTEP = 500  # of an example


class Bypassed(nn.Module):
    """In place of a removed block: what entered by the names of its inputs, in the order of its outputs."""

    def __init__(self, block: nn.Module, inputs: Sequence[str]):
        super().__init__()
        self.names = list(inspect.signature(block.forward).parameters)
        self.inputs = tuple(inputs)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The inputs that pass on: one, or a tuple of several."""
        given = {**dict(zip(self.names, arguments, strict=False)), **named}
        passing = tuple(given[name] for name in self.inputs)
        return passing[0] if len(passing) == 1 else passing


class Description:
    """A `Denoiser` of a model whose blocks stand in lists; a subclass says what is in a block and how long streams are.

    dense: the model class.
    lists: the paths of the lists of blocks, in the order of the forward pass.
    inputs: the arguments of a block that pass on if it goes, in the order of its outputs.
    arguments: the names of the forward pass's arguments, by role; see `Denoiser.call`.
    outputs: by kind of layer, the path inside it of the layer whose output bias is left when it is empty.
    """

    dense: ClassVar[type[nn.Module]]
    family: ClassVar[Family]
    lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    inputs: ClassVar[tuple[str, ...]] = ("hidden_states",)
    arguments: ClassVar[Mapping[str, str]] = {
        "noisy": "hidden_states",
        "timestep": "timestep",
        "text": "encoder_hidden_states",
        "pooled": "pooled_projections",
    }
    outputs: ClassVar[Mapping[str, str]] = {}
    policies: ClassVar[tuple[str, ...]] = ("all", "none")
    richest: ClassVar[str] = "all"
    conventions: ClassVar[Mapping[str, type[Counter]]] = {}
    legend: ClassVar[str] = "B: transformer block"

    def stem(self, model: Any) -> Layer:
        """What lies outside of the blocks."""
        raise NotImplementedError

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """The layers of one block, the block itself first."""
        raise NotImplementedError

    def lengths(self, model: Any, latent: tuple[int, int], text_length: int) -> dict[str, int]:
        """The number of positions of every stream."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """UserError for a model on which the laws have not been verified; here none."""

    @property
    def latent(self) -> str:
        """Name of the argument that holds the noisy latent."""
        return self.arguments["noisy"]

    # structure

    def blocks(self, model: Any, inner: bool = True) -> dict[str, nn.Module]:
        """The live blocks, by path."""
        return {
            f"{name}.{index}": block
            for name in self.lists
            for index, block in enumerate(model.get_submodule(name))
            if not isinstance(block, Bypassed)
        }

    def regions(self, model: Any) -> list[nn.Module]:
        """The blocks, which are compiled each by itself."""
        return list(self.blocks(model).values())

    def layers(self, model: Any) -> list[Layer]:
        """Every live layer, the stem first."""
        inside = [layer for path, block in self.blocks(model).items() for layer in self.inside(model, path, block)]
        return [self.stem(model), *inside]

    def groups(self, model: Any, policy: str) -> list[UnitGroup]:
        """The groups of all layers; under the policy "all" also every block."""
        widths = [layer.group for layer in self.layers(model) if layer.group is not None]
        paths = () if policy == "none" else self.blocks(model)
        return widths + [UnitGroup("block", path, 1, self.width(model), (path,)) for path in paths]

    def width(self, model: Any) -> int:
        """Channels of the hidden states that enter a block."""
        return int(model.inner_dim)

    def passage(self, model: Any, group: UnitGroup) -> Passage:
        """A block's inputs by name."""
        return Passage(group.path, group.path, self.inputs)

    def after_cut(self, model: Any, layer: Layer, kept: Sequence[int]) -> None:
        """Update what modules remember of their widths; here nothing."""

    def empty(self, model: Any, layer: Layer) -> None:
        """Replace a layer by its output bias."""
        module = model.get_submodule(layer.path)
        model.set_submodule(layer.path, EmptiedLayer(module, self.outputs[layer.kind]))

    def bypass(self, model: Any, group: UnitGroup) -> None:
        """Replace a block by what passes its inputs on."""
        for path in group.covers:
            model.set_submodule(path, Bypassed(model.get_submodule(path), self.inputs))

    def outline(self, model: Any) -> dict[str, Place]:
        """The blocks below one another, up to eight in a row."""
        return {path: Place("left", index // 8, "B") for index, path in enumerate(self.blocks(model))}

    def pruned_class(self) -> type[PrunedModel]:
        """The class of the pruned models, made once."""
        dense: Any = self.dense
        return pruned_class(dense, self)

    def stock(self, model: Any) -> Any:
        """The model itself if it is dense; of a pruned one there is no stock form."""
        return None if isinstance(model, PrunedModel) else model

    def blank(self, model: Any) -> Any:
        """A dense model of the same config, on the meta device."""
        config = {key: value for key, value in model.config.items() if not key.startswith("_") and key != "pruning"}
        with torch.device("meta"):
            return self.dense(**config)

    # calls

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """The call that predicts for noisy latents."""
        given = {"noisy": noisy, "timestep": timesteps, **conditions}
        return Call({self.arguments[role]: value for role, value in given.items()})

    def example(
        self,
        model: Any,
        batch: int,
        latent: tuple[int, int],
        text_length: int,
        fill: Fill,
        timesteps: Tensor | None = None,
    ) -> Call:
        """A call of the right shapes."""
        noisy = fill("noisy", (batch, self.latent_channels(model), *latent))
        conditions = {"text": fill("text", (batch, text_length, self.text_width(model)))}
        if pooled := self.pooled_width(model):
            conditions["pooled"] = fill("pooled", (batch, pooled))
        timesteps = torch.tensor(TIMESTEP, device=noisy.device) if timesteps is None else timesteps
        return self.call(noisy, timesteps, conditions)

    def at(self, call: Call, noisy: Tensor, timesteps: Tensor) -> Call:
        """The call under the same conditions for other noisy latents at other timesteps."""
        return call.replace(**{self.arguments["noisy"]: noisy, self.arguments["timestep"]: timesteps})

    def noisy(self, call: Call) -> Tensor:
        """The noisy latents of a call."""
        return call[self.arguments["noisy"]]

    def text_length(self, call: Call) -> int:
        """The tokens of a call's text."""
        return call[self.arguments["text"]].shape[1]

    def latent_channels(self, model: Any) -> int:
        """Channels of the latents."""
        return int(model.config.in_channels)

    def latent_size(self, model: Any) -> tuple[int, int] | None:
        """(h, w) of the latent that the model was made for."""
        size = model.config.sample_size
        return None if size is None else (size, size) if isinstance(size, int) else tuple(size)

    def text_width(self, model: Any) -> int:
        """Width of the text states."""
        return int(model.config.cross_attention_dim)

    def pooled_width(self, model: Any) -> int:
        """Width of the pooled text embedding; 0: the model takes none."""
        return 0
