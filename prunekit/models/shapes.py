"""Load the shapes of a model's parts, without weights or network."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from prunekit.core.denoiser import Denoiser
from prunekit.core.registry import (
    TOKENIZERS,
    denoiser_in,
    denoiser_named,
    family_of,
    latent_size,
    scale_of,
    supported,
)
from prunekit.models.names import (
    CONFIG_DIRECTORY,
    DENOISERS,
    SETTINGS,
    TEXT_TOKENS,
    check_index,
    hub_id,
    local_path,
    read_object,
    short_name,
    unknown,
)
from prunekit.models.single_file import check_size, config_name
from prunekit.runtime.errors import UserError

MOST = 2**20  # cap on a tokenizer's stated length, in tokens
MOST_LEVELS = 10  # most levels of an autoencoder; Stable Diffusion has 4
CLIP_TOKENS = 77  # length of a text of CLIP
LEVELS = ("block_out_channels", "encoder_block_out_channels", "dim_mult")  # config keys that list the levels, by class


@dataclass(frozen=True)
class PipelineShape:
    """Parts of a pipeline that cost counting needs, under the pipeline's attribute names; the denoiser is on meta."""

    name: str
    denoiser: ModelMixin
    vae_scale_factor: int  # pixels per latent position
    text_length: int  # tokens
    settings: Mapping[str, Any] = field(default_factory=dict)  # boolean settings of the pipeline

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was made for."""
        return pixels_of(self)


def resolution_of(pipeline: Any) -> int:
    """Return the side in pixels of the square pictures that a pipeline was trained for.

    Raises UserError for pictures that are not square, which training does not support.
    """
    height, width = pixels_of(pipeline)
    if height != width:
        raise UserError(f"the model is made for {height} x {width} pixels; set resolution=SIDE for square pictures")
    return height


def pixels_of(pipeline: Any) -> tuple[int, int]:
    """Return the height and width in pixels that a pipeline was made for."""
    (height, width), scale = latent_size(denoiser_in(pipeline)), scale_of(pipeline)
    assert scale is not None, "a pipeline, not a denoiser alone"
    return height * scale, width * scale


def load_unet_on_meta(name: str | Path, single_file_config: str | Path | None = None) -> ModelMixin:
    """Build a model's denoiser on the meta device from its config alone, without weights and without downloads.

    name: as in `load_pipeline`; a directory may hold a pipeline or a denoiser alone, stock or pruned. A hub id must be
    in `KNOWN`, or in the local hub cache. single_file_config: as in `load_pipeline`.
    Raises ValueError, one line: an unknown name, a config that cannot be read, or a denoiser that is not supported.
    """
    return _unet(name, _configured(name, single_file_config))


def unet_from_config(config: dict[str, Any], name: str | Path) -> ModelMixin:
    """Build a stock or pruned denoiser on the meta device; raise ValueError, one line, if it is not supported.

    config: the denoiser's config; one that does not state a class is read as a UNet's.
    """
    return _described(config, name).from_config(config, name)


def check_sizes(config: dict[str, Any], name: str | Path) -> None:
    """Raise UserError for a config with invalid sizes, or with sizes so large that building the model would not end."""
    _described(config, name).check_config(config, name)


def _described(config: dict[str, Any], name: str | Path) -> Denoiser:
    stated = config.get("_class_name")
    try:
        return denoiser_named(None if stated is None else str(stated))
    except UserError as error:
        known = ", ".join(supported())
        raise UserError(
            f"the denoiser of {name} is a {stated}, which is not supported; prunekit prunes {known}"
        ) from error


def load_shape(name: str | Path, single_file_config: str | Path | None = None) -> PipelineShape:
    """Return a model's shapes for cost counting, without weights; arguments and errors as in `load_unet_on_meta`.

    For a denoiser's directory without the rest of its pipeline, the usual values of its family are assumed, such as
    scale 8 and 77 tokens for Stable Diffusion.
    """
    source = _configured(name, single_file_config)
    directory = local_path(source)
    lengths, denoiser = {}, _unet(name, source)
    scale = family_of(denoiser).scale
    short = short_name(source) or ""
    settings = SETTINGS.get(short, {})
    if directory is not None:
        autoencoder = directory / "vae" / "config.json"
        if autoencoder.is_file():
            scale = _scale(autoencoder)
        files = {part: directory / part / "tokenizer_config.json" for part in TOKENIZERS}
        lengths = {part: _most_tokens(path) for part, path in files.items() if path.is_file()}
        if (index := directory / "model_index.json").is_file():
            settings = {key: value for key, value in read_object(index).items() if isinstance(value, bool)}
    tokens = TEXT_TOKENS.get(short) or family_of(denoiser).text_length(lengths)
    return PipelineShape(str(name), denoiser, scale, tokens, settings)


def _most_tokens(tokenizer: Path) -> int:
    """Return the maximum length of a text in a tokenizer's config; CLIP's length if the config does not state one."""
    tokens = read_object(tokenizer).get("model_max_length", CLIP_TOKENS)
    if type(tokens) is not int or tokens < 1:
        raise UserError(f"{tokenizer}: model_max_length={tokens!r} is not a positive integer")
    return min(tokens, MOST)


def _scale(autoencoder: Path) -> int:
    """Return the pixels per latent position along a side, from an autoencoder's config."""
    config = read_object(autoencoder)
    scale = config.get("scale_factor_spatial")
    if type(scale) is int and 1 <= scale <= 2**MOST_LEVELS:
        return scale
    levels = next((config[name] for name in LEVELS if name in config), None)
    if not isinstance(levels, list) or not 1 <= len(levels) <= MOST_LEVELS:
        raise UserError(f"{autoencoder}: block_out_channels={levels!r} is not a list of 1 to {MOST_LEVELS} sizes")
    return 2 ** (len(levels) - 1)


def _unet(name: str | Path, source: str | Path) -> ModelMixin:
    """Build the denoiser of `name` from the configs of `source`."""
    unet = unet_from_config(_unet_config(source), name)
    if source is not name:
        check_size(Path(name).expanduser(), unet, source)
    return unet


def _configured(name: str | Path, single_file_config: str | Path | None) -> str | Path:
    """Return the model whose configs to read: `name`, or for a single file the model that its configs come from."""
    path = local_path(name)
    return config_name(path, single_file_config) if path is not None and path.is_file() else name


def _unet_config(name: str | Path) -> dict[str, Any]:
    directory = local_path(name)
    if directory is not None:
        if (directory / "model_index.json").is_file():
            check_index(read_object(directory / "model_index.json"), name)
        for path in (*(directory / part / "config.json" for part in DENOISERS), directory / "config.json"):
            if path.is_file():
                return read_object(path)
        raise UserError(
            f"{directory} holds neither unet/config.json or transformer/config.json (a pipeline) nor config.json (a "
            "UNet or transformer)"
        )
    short = short_name(name)
    if short is not None:
        return read_object(CONFIG_DIRECTORY / f"{short}.json")
    from huggingface_hub import try_to_load_from_cache

    for part in DENOISERS:
        cached = try_to_load_from_cache(hub_id(name), f"{part}/config.json")
        if isinstance(cached, str):
            return read_object(Path(cached))
    raise unknown(name)
