"""Exporting a pruned denoiser: as a stock diffusers model, with its class in a file, or as a graph."""

from prunekit.export.adapters import check_controlnet, check_t2i_adapter, copy_ip_adapter
from prunekit.export.folding import fold_modulation, project_lora, record_modulation
from prunekit.export.lora_slicing import slice_lora
from prunekit.export.model_folder import load_denoiser
from prunekit.export.pipeline_parts import load_pipeline_directory
from prunekit.export.tiers import register_with_diffusers, save_denoiser

load_unet, save_unet = load_denoiser, save_denoiser  # their names in version 0.1

__all__ = [
    "check_controlnet",
    "check_t2i_adapter",
    "copy_ip_adapter",
    "fold_modulation",
    "load_denoiser",
    "load_pipeline_directory",
    "load_unet",
    "project_lora",
    "record_modulation",
    "register_with_diffusers",
    "save_denoiser",
    "save_unet",
    "slice_lora",
]
