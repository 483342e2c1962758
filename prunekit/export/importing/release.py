"""Reading a release of APTP's published implementation, file by file; no code in it is run.

    hypernet/ quantizer/                  config.json and weights: the router, and the codes' gates (N, D)
    quantizer_embeddings.pt               the same gates, in a checkpoint of a search
    arch0/checkpoint-30000/arch_vector.pt an expert's gates (1, D)
    arch0/checkpoint-30000/unet/          the same expert's weights, cut and fine-tuned

A folder with an `arch_vector.pt` directly in it is one expert. Missing files are left out.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

from prunekit.models.names import read_object
from prunekit.runtime.errors import UserError

VECTOR, CODEBOOK = "arch_vector.pt", "quantizer_embeddings.pt"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
MOST_GATE = 1.5  # a sigmoid, plus 0.5 for the gate that the published code holds open in an otherwise empty group
_EXPERT = re.compile(r"arch_?(\d+)")


@dataclass(frozen=True)
class Predictor:
    """The router's linear layer e = W·z + b, and the codes.

    weight: W (D, Z), with rows in the order of a code's values. bias: b (D,), or None. codes: (N, D).
    """

    weight: Tensor
    bias: Tensor | None
    codes: Tensor


@dataclass(frozen=True)
class Release:
    """The contents of a release.

    vectors: (N, D) gates, from 0 to 1.5, in the published order. weights: each expert's weight file; None if missing.
    predictor: the router; None if there is none. structures: `structure` of each config, by file.
    notes: notes for the user, one line each.
    """

    vectors: Tensor
    weights: list[Path | None]
    predictor: Predictor | None
    structures: dict[Path, dict[str, Any]]
    notes: list[str]


def read_release(directory: Path) -> Release:
    """Read a release's directory; raise UserError if it holds no vectors, or a faulty file."""
    if not directory.is_dir():
        raise UserError(f"no directory {str(directory)!r}; give a release's, with {VECTOR}, quantizer/ or {CODEBOOK}")
    structures = {
        path: read_object(path).get("structure")
        for path in (directory / part / "config.json" for part in ("hypernet", "quantizer"))
        if path.is_file()
    }
    quantizer = _part(directory / "quantizer")
    codebook = _codebook(directory, quantizer)
    folders, notes = _experts(directory), []
    if codebook is None and not folders:
        raise UserError(f"{directory} holds no architecture vectors: neither {VECTOR}, quantizer/ nor {CODEBOOK}")
    vectors = {} if codebook is None else dict(enumerate(codebook))
    for index, folder in folders.items():
        expert_vectors = _vectors(folder / VECTOR)
        if expert_vectors.shape[0] != 1:
            raise UserError(f"{folder / VECTOR} holds {expert_vectors.shape[0]} vectors; an expert has one")
        if codebook is not None and index >= len(codebook):
            raise UserError(f"{folder} is expert {index}, but the codes are {len(codebook)}")
        if index in vectors and not torch.equal(expert_vectors[0] >= 0.5, vectors[index] >= 0.5):
            notes.append(f"expert {index}'s own vector differs from the quantizer's; its own is taken")
        vectors[index] = expert_vectors[0]
    if sorted(vectors) != list(range(len(vectors))):
        raise UserError(f"{directory} has experts {sorted(vectors)}: some are missing between them, and no quantizer")
    if len({len(vector) for vector in vectors.values()}) > 1:
        raise UserError(f"the vectors in {directory} differ in length: {[len(vector) for vector in vectors.values()]}")
    weights = [_weights(folders[index] / "unet") if index in folders else None for index in range(len(vectors))]
    stacked = torch.stack([vectors[index] for index in range(len(vectors))])
    predictor = _predictor(directory / "hypernet", quantizer, len(stacked))
    return Release(stacked, weights, predictor, {k: v for k, v in structures.items() if v is not None}, notes)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a weight file's tensors; raise UserError for an unreadable file, or a pickle with more than tensors."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file ({error}); copy it again") from error
    content = _unpickled(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no weights by name, but a {type(content).__name__}")
    return content


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as plain tensors (torch.load with weights_only=True refuses it); a pickle "
            "that holds more can run code and is not loaded: if you trust it, save its tensors alone"
        ) from error


def _vectors(path: Path) -> Tensor:
    """Return a file's gates (n, D)."""
    content = _unpickled(path)
    if not isinstance(content, Tensor) or not content.is_floating_point() or content.dim() not in (1, 2):
        raise UserError(f"{path} holds no architecture vectors, but {_said(content)}; expected: floats (n, D)")
    return _checked(content, path)


def _checked(values: Tensor, path: Path) -> Tensor:
    """Return gates (n, D) in float32; raise UserError for values outside 0 to MOST_GATE."""
    values = values.detach().float().reshape(-1, values.shape[-1])
    if not bool(((values >= 0) & (values <= MOST_GATE)).all()):
        raise UserError(f"{path} holds values outside 0 to {MOST_GATE}, so they are not the gates of an architecture")
    return values


def _said(content: Any) -> str:
    return f"a {content.dtype} tensor {tuple(content.shape)}" if isinstance(content, Tensor) else type(content).__name__


def _part(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the hypernet or the quantizer; empty where there are none."""
    path = _weights(folder)
    return {} if path is None else read_weights(path)


def _weights(folder: Path) -> Path | None:
    """Return a part's weight file; None if it has none."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _codebook(directory: Path, quantizer: dict[str, Tensor]) -> Tensor | None:
    if "embedding_gs" in quantizer:
        return _checked(quantizer["embedding_gs"], directory / "quantizer")
    return _vectors(directory / CODEBOOK) if (directory / CODEBOOK).is_file() else None


def _experts(directory: Path) -> dict[int, Path]:
    """Return the folder with each expert's vector; of several checkpoints, the one with the most steps."""
    if (directory / VECTOR).is_file():
        return {0: directory}
    folders = {}
    for folder in directory.iterdir():
        match = _EXPERT.fullmatch(folder.name)
        places = [path.parent for path in [*folder.glob(VECTOR), *folder.glob(f"checkpoint-*/{VECTOR}")]]
        if match and places:
            folders[int(match[1])] = max(
                places, key=lambda path: int(re.sub(r"\D", "", path.name.partition("-")[2]) or 0)
            )
    return folders


def _predictor(folder: Path, quantizer: dict[str, Tensor], count: int) -> Predictor | None:
    """Return the hypernet's layers as one, and the codes; None if either is missing, or for a single architecture."""
    tensors, codes = _part(folder), quantizer.get("embedding.weight")
    if not tensors or codes is None or count == 1:
        return None
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"mh_fc\.(\d+)\.(.+)", name):
            layers.setdefault(int(match[1]), {})[match[2]] = value
    weights = [layer["weight"] if "weight" in layer else _normalized(layer) for _, layer in sorted(layers.items())]
    biases = [layer["bias"] for _, layer in sorted(layers.items()) if "bias" in layer]
    if not weights or codes.shape[1] != sum(map(len, weights)):
        raise UserError(f"{folder} predicts {sum(map(len, weights))} values, but a code has {codes.shape[1]}")
    bias = None if len(biases) < len(weights) else torch.cat(biases)
    return Predictor(torch.cat(weights), bias, codes)


def _normalized(tensors: dict[str, Tensor]) -> Tensor:
    """Return the weight of a layer that was saved with weight norm, as length and direction (`wn_flag`)."""
    direction = tensors["parametrizations.weight.original1"]
    layer = weight_norm(torch.nn.Linear(direction.shape[1], direction.shape[0], bias=False))
    layer.load_state_dict({name: value for name, value in tensors.items() if name != "bias"})
    return layer.weight.detach()
