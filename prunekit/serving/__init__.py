"""Draw with the pruned models of a run: each prompt goes to its expert, in a Python call, in bulk, or over HTTP.

Names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunekit.serving.backend import Backend, Drawn, Job
    from prunekit.serving.bulk import read_metadata
    from prunekit.serving.drawer import Picture
    from prunekit.serving.in_process import InProcessBackend
    from prunekit.serving.pipeline import PromptRoutedPipeline
    from prunekit.serving.routed_call import RoutedOutput

__all__ = [
    "Backend",
    "Drawn",
    "InProcessBackend",
    "Job",
    "Picture",
    "PromptRoutedPipeline",
    "RoutedOutput",
    "read_metadata",
]

_MODULE_OF = {
    "Backend": "backend",
    "Drawn": "backend",
    "InProcessBackend": "in_process",
    "Job": "backend",
    "Picture": "drawer",
    "PromptRoutedPipeline": "pipeline",
    "RoutedOutput": "routed_call",
    "read_metadata": "bulk",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'prunekit.serving' has no attribute {name!r}")
    return getattr(importlib.import_module(f"prunekit.serving.{_MODULE_OF[name]}"), name)
