"""Slicing: `slice_model` makes a pruned model, a denoiser whose removed units are physically gone.

A pruned model's `config.json` holds the dense config, the record of the cut in `pruning` (see `record`), and, if its
modulation layers are folded, `folding` (see `modulation`).

Several pruned models may share one set of weights, a *backbone*. A *member's* folder has a config and `backbone.json`,
which names the backbone's folder; loading a member slices the backbone.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers import ModelMixin
from diffusers.models.model_loading_utils import load_state_dict
from torch import nn

from prunekit.runtime.errors import UserError, first_line

from .axes import Axis, Layer
from .cutting import keep_channels
from .denoiser import Structure
from .discovery import match_in, whole_space
from .emptied import names_in_files, renamed
from .modulation import fold
from .record import kept_units, read_pruning, record_cut
from .registry import denoiser_named, denoiser_of
from .space import Architecture

CUT = ("pruning", "folding")  # entries that only a pruned model's config has
FORMAT = 1  # format of a member's folder
POINTER = "backbone.json"  # file of a member: names the folder of its weights
DELTAS = "deltas.safetensors"  # optional file of a member: its changes to the backbone's weights
DOWN, UP, SHIFT = ".down", ".up", ".shift"  # suffixes of tensor names in DELTAS: low-rank factors, full change
SAVED_MODULE = "prunekit.slicing"  # the module that saved pipelines name; see there


class PrunedModel(ModelMixin):
    """The base of the classes of pruned models; it stands before the class of the dense model among their bases.

    A subclass calls `_prune` in its constructor, and gives the constructor the signature `config_signature`.

    structure: description of the dense model.
    """

    structure: ClassVar[Structure]

    def _prune(self, pruning: Mapping[str, Any] | None, folding: Mapping[str, Any] | None = None) -> None:
        """Cut this model, which is dense, as `pruning` says, and fold its modulation layers as `folding` says."""
        if pruning is not None:
            cut(self.structure, self, read_pruning(pruning, whole_space(self.structure, self)))
        self.register_to_config(pruning=pruning)
        if folding is not None:
            fold(self.structure.modulation, self, folding)
            self.register_to_config(folding=folding)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> Any:
        """Build a model like the stock method; ignore `auto_map`, by which diffusers finds a class file."""
        return super().from_config({key: value for key, value in config.items() if key != "auto_map"}, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Load a model like the stock method; also from a member's folder, with the weights of a shared backbone."""
        backbone = backbone_of(pretrained_model_name_or_path)
        if backbone is None:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        return slice_member(cls, super().from_pretrained(backbone, **options), pretrained_model_name_or_path)

    @classmethod
    def _load_pretrained_model(
        cls,
        model: Any,
        state_dict: Mapping[str, torch.Tensor] | None,
        resolved_model_file: list[Any],
        pretrained_model_name_or_path: str | Path,
        loaded_keys: list[str],
        **options: Any,
    ) -> Any:
        """Load weights like the stock method; tensors of the files get the names that they have in memory."""
        names = {in_file: in_memory for in_memory, in_file in names_in_files(model).items()}
        if names and state_dict is not None:
            state_dict = renamed(state_dict, names)
        elif names:  # several files
            no_map = options.get("disable_mmap", False)
            resolved_model_file = [
                renamed(load_state_dict(path, disable_mmap=no_map), names) for path in resolved_model_file
            ]
        keys = [names.get(key, key) for key in loaded_keys]
        return super()._load_pretrained_model(
            model, state_dict, resolved_model_file, pretrained_model_name_or_path, keys, **options
        )

    def _save_with_names(self, save: Any, *arguments: Any, **options: Any) -> None:
        """Run the stock `save_pretrained`, with the names that tensors have in files."""
        handle = self.register_state_dict_post_hook(_name_as_in_files)
        try:
            save(*arguments, **options)
        finally:
            handle.remove()


@functools.cache
def pruned_class(dense: Any, structure: Structure, module: str = SAVED_MODULE) -> type[PrunedModel]:
    """Return the class of the pruned models of a dense class, `PrunedX` for X; it is made once.

    module: name of the module in which loaders of saved pipelines find the class.
    """

    def construct(
        self: Any, pruning: Mapping[str, Any] | None = None, folding: Mapping[str, Any] | None = None, **config: Any
    ) -> None:
        super(pruned, self).__init__(**config)
        self._prune(pruning, folding)

    @functools.wraps(dense.save_pretrained)  # pipelines read the options from the signature
    def save_pretrained(self: Any, *arguments: Any, **options: Any) -> None:
        self._save_with_names(super(pruned, self).save_pretrained, *arguments, **options)

    def load_ip_adapter(self: Any, *arguments: Any, **options: Any) -> None:
        """Load an IP-Adapter like the stock method; raise UserError if attentions lost heads."""
        cut = [layer.path for layer in structure.layers(self) if layer.kind == "attention" and layer.group is not None]
        cut = [path for path in cut if kept_units(self, f"attention:{path}") is not None]
        if cut:
            raise UserError(
                f"an IP-Adapter needs all heads of the dense model, and {', '.join(cut[:3])} lost some; use a "
                "cut that keeps all heads"
            )
        super(pruned, self)._load_ip_adapter_weights(*arguments, **options)

    vars(construct)["__signature__"] = config_signature(dense)
    content = {
        "__doc__": f"A {dense.__name__} without the units that an Architecture removed; built from its config alone.",
        "__init__": construct,
        "save_pretrained": save_pretrained,
        "_load_ip_adapter_weights": load_ip_adapter,
        "structure": structure,
        "__module__": module,
    }
    pruned: Any = type(f"Pruned{dense.__name__}", (PrunedModel, dense), content)
    return cast("type[PrunedModel]", pruned)


def export_model(model: nn.Module, folder: str | Path) -> Literal["stock", "pruned"]:
    """Save a pruned model in its stock form if there is one, else in its pruned form; return which.

    The stock form loads without prunekit, by the dense class's `from_pretrained(folder)`; the
    pruned form by the pruned class's.
    """
    stock = denoiser_of(model).stock(model)
    saved: Any = model if stock is None else stock
    saved.save_pretrained(folder)
    return "pruned" if stock is None else "stock"


def config_signature(dense: type[ModelMixin]) -> inspect.Signature:
    """Return the signature of a dense class's constructor plus `CUT`; diffusers reads the keys of a config from it."""
    parameters = inspect.signature(dense.__init__).parameters.values()
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in CUT]
    return inspect.Signature([*parameters, *added])


def slice_model(model: nn.Module, architecture: Architecture) -> Any:
    """Return a pruned copy of a denoiser with the units that a boolean Architecture keeps; the model does not change.

    Works on the meta device, on a model that is already pruned, and with an Architecture from another instance of the
    same space. The copy has the model's dtype, device, training mode, frozen parameters and attention processors.

    Raises:
        UserError: the Architecture is soft or does not fit the model, or the model has fused attention projections.

    """
    pruned_class = denoiser_of(model).pruned_class()
    assert issubclass(pruned_class, PrunedModel)
    return _sliced(pruned_class, model, architecture)


def load_model(folder: str | Path, **options: Any) -> Any:
    """Load a saved denoiser, stock or pruned, as the pruned class of its model class.

    options: options of `from_pretrained`.

    Raises:
        UserError: no `Denoiser` describes the class.

    """
    name = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("_class_name")
    pruned_class: Any = denoiser_named(name).pruned_class()
    return pruned_class.from_pretrained(folder, **options)


def _sliced(pruned_class: type[PrunedModel], model: ModelMixin, architecture: Architecture) -> Any:
    if not architecture.is_boolean:
        raise UserError("a soft Architecture cannot be cut; make it boolean first: architecture.threshold(0.5)")
    structure = pruned_class.structure
    whole = whole_space(structure, model)
    match_in(whole, architecture.space)
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        raise UserError("fused attention projections cannot be cut; call unfuse_qkv_projections() first")
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        pruned = pruned_class(**config)
    pruned.load_state_dict(model.state_dict(), assign=True)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(name not in frozen)
    originals = dict(model.named_modules())
    for name, module in pruned.named_modules():
        if hasattr(module, "set_processor"):
            module.set_processor(originals[name].processor)
    share_tables(structure, model, pruned)
    cut(structure, pruned, architecture)
    memory = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for parameter in pruned.parameters():
        if parameter.untyped_storage().data_ptr() in memory:  # not cut: it still shares the model's memory
            parameter.data = parameter.data.clone()
    pruned.train(model.training)
    pruned.register_to_config(pruning=record_cut(architecture, model, whole))
    return pruned


def share_tables(structure: Structure, original: nn.Module, copy: nn.Module) -> None:
    """Let a model on the meta device share the tables of another model of its class."""
    for path in structure.tables:
        source, target = original.get_submodule(path), copy.get_submodule(path)
        for tensors in (target._buffers, vars(target)):
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor) and value.is_meta:
                    tensors[name] = getattr(source, name)


def cut(structure: Structure, model: nn.Module, architecture: Architecture) -> None:
    """Cut a model in place: first the axes of all weights, then layers that lost all their units, then whole layers."""
    gone = architecture.removed()
    layers = {layer.group.name: layer for layer in structure.layers(model) if layer.group is not None}
    owners = Counter(path for layer in layers.values() for path in set(map(layer.place, layer.axes)))
    cuts: list[tuple[Layer, list[int]]] = []
    for group in architecture.space.width_groups:
        if any(removed.removes(group.path) for removed in gone):
            continue
        kept = architecture.kept(group.name)
        if len(kept) < group.size:
            cuts.append((layers[group.name], kept))
    weights: dict[tuple[str, bool], list[tuple[Axis, Layer, list[int]]]] = {}
    for layer, kept in cuts:
        for axis in layer.axes:
            path = layer.place(axis)
            if kept or owners[path] > 1:  # an emptied layer is replaced; weights that it shares are cut
                weights.setdefault((path, axis.side == "in"), []).append((axis, layer, kept))
    for (path, is_input), axes in weights.items():
        keep_channels(model.get_submodule(path), axes, is_input)
    for layer, kept in cuts:
        if kept:
            structure.after_cut(model, layer, kept)
            continue
        structure.empty(model, layer)
        for path in layer.feeds:
            if not path.startswith(layer.path + "."):
                model.set_submodule(path, nn.Identity())
    for group in gone:
        structure.bypass(model, group)


def save_member(model: nn.Module, architecture: Architecture, folder: Path, backbone: Path) -> None:
    """Write a member's folder, which loads as the model sliced to the Architecture, with weights from a backbone.

    model: a dense model.
    backbone: folder where the model is saved. It is named by its path from `folder`, so the two can be moved together.
    """
    slice_model(blank_copy(model), architecture).save_config(folder)
    pointer = {"format": FORMAT, "backbone": Path(os.path.relpath(backbone, folder)).as_posix()}
    (folder / POINTER).write_text(json.dumps(pointer, indent=2) + "\n", encoding="utf-8")


def backbone_of(folder: str | Path) -> Path | None:
    """Return the backbone's folder of a member's folder; None for any other folder.

    Raises:
        UserError: the member's `backbone.json` is damaged, has another format, or names a folder that does not exist.

    """
    path = Path(folder) / POINTER
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']!r}; this version of prunekit reads format {FORMAT}")
        backbone = (Path(folder) / content["backbone"]).resolve()
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} does not name a backbone: {error!r}") from error
    if not backbone.is_dir():
        raise UserError(f"{path} names {backbone}, which does not exist: copy the backbone's folder too")
    return backbone


def blank_copy(model: nn.Module) -> nn.Module:
    """Return a dense model with a model's config, without weights: on the meta device."""
    return denoiser_of(model).blank(model)


def blank_of(dense: Any, model: Any) -> Any:
    """Return a model of a dense class with a model's config, without weights: on the meta device."""
    with torch.device("meta"):
        return dense(**dense_config(model))


def dense_config(model: Any) -> dict[str, Any]:
    """Return the constructor arguments of the dense model from a model's config."""
    return {key: value for key, value in model.config.items() if not key.startswith("_") and key not in CUT}


def hollow(kind: Any, config: Mapping[str, Any], what: str) -> Any:
    """Return a model of a class, built from its config on the meta device, without weights.

    what: name of the model in the error.

    Raises:
        UserError: the config builds no model.

    """
    try:
        with torch.device("meta"):
            return kind.from_config(config)
    except Exception as error:  # a damaged config makes the constructor raise almost anything
        raise UserError(
            f"{what} is not supported: its config builds no {kind.__name__} ({first_line(error)})"
        ) from error


def slice_member(pruned_class: type[PrunedModel], model: nn.Module, folder: str | Path) -> Any:
    """Return a backbone sliced to the Architecture of a member's folder, with the member's changes to the weights."""
    pruning = pruned_class.load_config(folder)["pruning"]
    sliced = _sliced(pruned_class, model, read_pruning(pruning, whole_space(pruned_class.structure, model)))
    if (Path(folder) / DELTAS).is_file():
        _change(sliced, Path(folder) / DELTAS)
    return sliced


@torch.no_grad()
def _change(model: nn.Module, path: Path) -> None:
    """Add the changes in a file to a model's weights; raise UserError if the file does not fit the model."""
    names, changes = names_in_files(model), load_state_dict(path)
    known = {names.get(name, name): parameter for name, parameter in model.named_parameters()}
    for name in dict.fromkeys(key.rpartition(".")[0] for key in changes):
        if name not in known:
            raise UserError(f"{path} does not fit the model of its folder: the model has no {name}")
        weight, shift = known[name], changes.get(name + SHIFT)
        try:
            change = changes[name + UP].double() @ changes[name + DOWN].double() if shift is None else shift.double()
            weight.copy_(weight.double() + change.reshape(weight.shape).to(weight.device))
        except KeyError as error:
            raise UserError(f"{path} is damaged: it has no {error.args[0]}") from error
        except RuntimeError as error:
            raise UserError(f"{path} does not fit the model of its folder: {name}: {first_line(error)}") from error


def keep_saved_module(pruned: type) -> None:
    """Set a class's module to the one that saved pipelines have always named, wherever the class is defined."""
    pruned.__module__ = SAVED_MODULE


def _name_as_in_files(model: nn.Module, state: dict[str, torch.Tensor], *_: Any) -> None:
    """Rename a state dict's tensors, in place and in their order, to the names that they have in files."""
    items = renamed(state, names_in_files(model))
    state.clear()
    state.update(items)
