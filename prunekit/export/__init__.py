"""Taking a pruned UNet elsewhere: as a stock diffusers UNet, with its class in a file, or as a graph."""

from prunekit.export.loading import load_unet
from prunekit.export.parts import load_pipeline_directory
from prunekit.export.tiers import save_unet

__all__ = ["load_pipeline_directory", "load_unet", "save_unet"]
