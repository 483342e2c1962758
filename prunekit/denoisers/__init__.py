"""One folder per family of denoisers. A folder's `__init__` names its model classes and imports nothing heavy."""

import importlib
import pkgutil

from prunekit.core.registry import register_denoiser


def register() -> None:
    """Register the denoisers of every folder here; what describes a model is imported when it is first needed."""
    # UNets first: a config that names no class is one of theirs
    for folder in sorted(pkgutil.iter_modules(__path__), key=lambda folder: folder.name != "unet"):
        if not folder.ispkg:  # what several families share
            continue
        family = importlib.import_module(f"{__name__}.{folder.name}")
        register_denoiser(family.MODELS, family.denoiser, family.ATTRIBUTE)
