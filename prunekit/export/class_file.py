"""The class file: PrunedUNet2DConditionModel in one file that needs torch and diffusers alone.

It lies beside the weights (`unet/modeling_pruned.py`), so that diffusers loads the model with `trust_remote_code=True`
where prunekit is not installed.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from pathlib import Path

from diffusers import pipelines

from prunekit import slicing
from prunekit.denoisers.unet import pruned
from prunekit.export.bundle import bundle

MODULE = "modeling_pruned"  # an export's file with the class, and its entry in model_index.json
CLASS = pruned.PrunedUNet2DConditionModel.__name__
_CUTTING, _PLAIN = "prunekit.core.cutting", "prunekit.export.plain_cutting"
_INSTEAD = {(_CUTTING, name): (_PLAIN, name) for name in ("keep_out", "keep_in", "keep_groups")}
_TITLE = """A Stable Diffusion UNet with parts cut out: {name}, for diffusers.

Written by prunekit {version} from its own sources; do not edit. It needs torch and diffusers, and nothing else. The
config's `pruning` says which units each layer keeps and which layers are gone; the constructor cuts a UNet to it.
Licence: Apache-2.0.
"""


@cache
def class_file_source() -> str:
    """Return the text of the class file."""
    title = _TITLE.format(name=CLASS, version=version("prunekit"))
    return bundle(pruned.__name__, CLASS, _INSTEAD, title)


def write_class_file(folder: Path) -> Path:
    """Write the class file into a UNet's folder; return its path."""
    path = folder / f"{MODULE}.py"
    path.write_text(class_file_source(), encoding="utf-8")
    return path


def register_with_diffusers() -> None:
    """Let `DiffusionPipeline.from_pretrained` open exports of the tier `class` by prunekit's class in this process.

    Call it once where other code loads the pipelines; no code of their folders runs then, and none has to be trusted.
    It adds an entry to `diffusers.pipelines`, in which diffusers looks up the names of a `model_index.json`.
    """
    setattr(pipelines, MODULE, slicing)
