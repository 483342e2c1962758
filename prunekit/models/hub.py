"""Fetch a hub id's files into the local hub cache; without the hub, use the cache or raise a one-line error."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from prunekit.core.registry import pipeline_parts
from prunekit.models.names import LOCAL, check_index, hub_id, read_object
from prunekit.models.weights import WITHOUT, missing_parts, variant_of
from prunekit.runtime.errors import UserError, first_line

INDEX = "model_index.json"
CONFIGS = ("*.json", "*.txt", "**/*.json", "**/*.txt")
HTTP_CLIENTS = {"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
TIMEOUT = 30  # seconds to wait for the list of a repository's files


@dataclass(frozen=True)
class Hub:
    """The hub's list of a repository's files, or the error with which the request failed; then the cache is used."""

    names: list[str]
    failure: Exception | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a download: only from the cache if the hub could not be reached, so as not to wait again."""
        return {"local_files_only": self.failure is not None}


def fetch(name: str | Path, check_denoiser: Callable[[dict[str, Any], str], Any]) -> Path:
    """Return a pipeline's directory in the hub cache; fetch missing files, only safetensors and text.

    check_denoiser: function that is called with the denoiser's config and the hub id before any weights are fetched.
    Raises ValueError, one line: the hub has no such model or cannot be reached, or the model is not supported.
    """
    repository = hub_id(name)
    with asking(repository) as hub:
        index = read_object(Path(hf_hub_download(repository, INDEX, **hub.options)))
        check_index(index, name)
        config = f"{pipeline_parts()[index['_class_name']]}/config.json"
        check_denoiser(read_object(Path(hf_hub_download(repository, config, **hub.options))), repository)
        options = {part: None for part in WITHOUT if part in index} | {"use_safetensors": True, **hub.options}
        directory = Path(DiffusionPipeline.download(repository, variant=variant_of(hub.names), **options))
        if missing := missing_parts(directory, index):
            raise FileNotFoundError(f"no {', '.join(missing)}")
        return directory


def fetch_configs(name: str | Path, what: str) -> Path:
    """Return the directory in the hub cache with a pipeline's configs and tokenizers; errors as in `fetch`.

    what: name of these files in errors.
    """
    repository = hub_id(name)
    with asking(repository, what, "single_file_config=DIRECTORY, a pipeline's, which works offline") as hub:
        return Path(snapshot_download(repository, allow_patterns=list(CONFIGS), **hub.options))


def fetch_file(repository: str, file: str, local: str) -> Path:
    """Return the path of a repository's file in the hub cache; errors as in `fetch`, suggesting `local` instead."""
    with asking(repository, f"its {file}", local) as hub:
        return Path(hf_hub_download(repository, file, **hub.options))


@contextmanager
def asking(repository: str, what: str = "it", local: str = LOCAL) -> Iterator[Hub]:
    """Turn errors of the hub or its cache inside the context into a ValueError, one line.

    On an error, remove the repository's cache folder if it is new and has no complete weight file. Complete weight
    files stay, so that the next call resumes. what: name of the requested files in the message. local: the alternative
    that the message suggests.
    """
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    existed, hub = folder.is_dir(), _listing(repository)
    try:
        yield hub
    except BaseException as error:
        if not existed and not any(folder.glob("snapshots/**/*.safetensors")):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder.parent / ".locks" / folder.name, ignore_errors=True)
        if not _of_the_hub(error):
            raise
        raise UserError(f"{_reason(repository, hub.failure or error, what)}; give {local}") from error


def _listing(repository: str) -> Hub:
    try:
        return Hub([file.rfilename for file in HfApi().model_info(repository, timeout=TIMEOUT).siblings or ()])
    except Exception as error:
        if not _of_the_hub(error):
            raise
        return Hub([], error)


def _of_the_hub(error: BaseException) -> bool:
    """Return whether the connection, the hub or the disk failed; the HTTP client depends on the library's version."""
    roots = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(roots & HTTP_CLIENTS)


def _reason(repository: str, error: BaseException, what: str) -> str:
    if isinstance(error, GatedRepoError):
        return f"model {repository!r} is gated: accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no model {repository!r}, or it is private (then set HF_TOKEN)"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"the hub's {repository!r} is not a supported model: {first_line(error)}"
    offline = "offline mode is on, HF_HUB_OFFLINE" if constants.is_offline_mode() else first_line(error)
    return f"model {repository!r}: the hub cannot be reached, and {what} is not complete in the local cache ({offline})"
