"""Resolve a model's name, and load its pipeline or only the shapes of its parts, without weights or network."""

from prunekit.models.loading import load_pipeline, load_pipeline_of, quiet_libraries
from prunekit.models.lora import LoraWeights, as_lora, merge_lora
from prunekit.models.names import EMBEDDED, EMBEDDED_DIRECTORIES, KNOWN
from prunekit.models.shapes import PipelineShape, load_shape, load_unet_on_meta, resolution_of

__all__ = [
    "EMBEDDED",
    "EMBEDDED_DIRECTORIES",
    "KNOWN",
    "LoraWeights",
    "PipelineShape",
    "as_lora",
    "load_pipeline",
    "load_pipeline_of",
    "load_shape",
    "load_unet_on_meta",
    "merge_lora",
    "quiet_libraries",
    "resolution_of",
]
