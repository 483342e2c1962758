"""Merge LoRA weights into a pipeline, so that pruning and training work on one plain model."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open

from prunekit.models.hub import fetch_file
from prunekit.models.names import PICKLES
from prunekit.runtime.errors import MissingPackageError, UserError, first_line

STANDARD_NAME = "pytorch_lora_weights.safetensors"
ADAPTER = "merged"
_UP = re.compile(r".*\.(lora_B|lora_up|lora\.up|lora_linear_layer\.up)\.weight")  # one tensor per adapted layer


@dataclass(frozen=True)
class LoraWeights:
    """One LoRA and its scale."""

    path: str  # a .safetensors file, a directory that holds one, owner/name or owner/name/file.safetensors on the hub
    scale: float = 1.0


def as_lora(value: Any) -> Any:
    """Return a setting as a list of LoRAs; the setting is None, one path, or a list of paths and {path, scale}."""
    if value is None:
        return []
    items = value if isinstance(value, list | tuple) else [value]
    return [{"path": str(item)} if isinstance(item, str | Path) else item for item in items]


def merge_lora(
    pipeline: DiffusionPipeline, lora: Iterable[LoraWeights | Mapping[str, Any]], say: Callable[[str], Any]
) -> None:
    """Add LoRAs to the weights of a pipeline's UNet and text encoders, W + scale·(alpha/rank)·B·A, one after the other.

    say: function that takes one line per LoRA, with its name and the number of layers that it changed.
    Raises ImportError if peft is not installed, and ValueError, one line: no such file, a pickle, or a file that does
    not fit the model.
    """
    for item in lora:
        weights = item if isinstance(item, LoraWeights) else LoraWeights(**item)
        if find_spec("peft") is None:
            raise MissingPackageError(
                "merging LoRA weights needs peft; it comes with the extra `lora`: pip install 'prunekit[lora]'"
            )
        file = _file(weights.path)
        try:
            with _silent(), safe_open(file, "pt") as tensors:
                named = sum(_UP.fullmatch(name) is not None for name in tensors.keys())  # noqa: SIM118
                pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER)
                merged = _adapted_layers(pipeline)
                if not merged:
                    raise UserError("it has no weight for this model's UNet or text encoders")
                pipeline.fuse_lora(lora_scale=weights.scale)
                pipeline.unload_lora_weights()
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"LoRA {weights.path} cannot be merged into this model: {_reason(error)}") from error
        rest = f"; it has {named}, the other weights fit no layer of this model" if merged < named else ""
        say(f"LoRA {weights.path} is merged into {merged} layer(s) at scale {weights.scale:g}{rest}")


def _file(path: str) -> Path:
    """Return the LoRA file of a path, or fetch the file of a name on the hub."""
    local = Path(path).expanduser()
    if local.suffix.lower() in PICKLES:
        raise UserError(f"LoRA {path}: pickles can run code and are not loaded; give a .safetensors file")
    if local.is_file():
        return local
    if local.is_dir():
        names = sorted(entry.name for entry in local.glob("*.safetensors"))
        if STANDARD_NAME in names or len(names) == 1:
            return local / (STANDARD_NAME if STANDARD_NAME in names else names[0])
        raise UserError(f"LoRA {path}: the directory holds {len(names)} .safetensors files; name the one to merge")
    parts = path.split("/")
    if path.startswith((".", "/", "~")) or not 2 <= len(parts) <= 3 or not all(parts):
        raise UserError(f"LoRA {path}: no such file or directory")
    if len(parts) == 2 and local.suffix == ".safetensors":
        raise UserError(f"LoRA {path}: no such file; on the hub it is named owner/name/file.safetensors")
    repository, file = "/".join(parts[:2]), parts[2] if len(parts) == 3 else STANDARD_NAME
    return fetch_file(repository, file, "a .safetensors file, which works offline")


def _adapted_layers(pipeline: DiffusionPipeline) -> int:
    """Return the number of layers in the pipeline's models that have the adapter."""
    models = (getattr(pipeline, name, None) for name in pipeline._lora_loadable_modules)
    return sum(ADAPTER in getattr(module, "lora_A", ()) for model in filter(None, models) for module in model.modules())


@contextmanager
def _silent() -> Iterator[None]:
    """Silence diffusers' log inside the context, because the raised error has the same text."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _reason(error: Exception) -> str:
    """Return the error's message as one line; for a list of tensors that do not fit, only the first tensor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if "state_dict" in first_line(error) else first_line(error)
