"""One folder per denoiser family. The folder's `__init__` names models and pipelines and imports nothing heavy."""

import importlib
import pkgutil

from prunekit.core.registry import register_denoiser


def register() -> None:
    """Register the denoisers of every folder in this package; a description is imported when it is first needed."""
    for folder in pkgutil.iter_modules(__path__):
        if not folder.ispkg:  # a module that several families share
            continue
        family = importlib.import_module(f"{__name__}.{folder.name}")
        unnamed = getattr(family, "UNNAMED", None)
        register_denoiser(family.MODELS, family.denoiser, family.ATTRIBUTE, unnamed, family.PIPELINES)
