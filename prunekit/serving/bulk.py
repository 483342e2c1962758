"""Draw many pictures into one directory, by any number of processes; killed processes can be started again.

Pictures are drawn in fixed batches: by expert, then by prompt and seed. So a picture's bytes do not depend on the order
of the request or on the process that draws it. Processes with the same request share the work by lock files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from prunekit.data.fingerprint import Fingerprint
from prunekit.data.picture_files import open_picture, write_image
from prunekit.runtime.errors import UserError
from prunekit.runtime.executors import Call, Executor, OnePiece
from prunekit.runtime.files import read_json, write_json
from prunekit.runtime.progress import Progress
from prunekit.runtime.work import Piece, Sharing, occupied, refuse_foreign, share
from prunekit.serving.pipeline import PromptRoutedPipeline
from prunekit.serving.routed_call import RoutedOutput

FORMATS = ("png", "webp")  # both are lossless
KEY = "prunekit"
_DESCRIPTION = 0x010E  # EXIF's ImageDescription
WORK = ".work"  # folder in the directory, with the request and the locks
REQUEST = "request.json"  # file in WORK
BATCHES_PER_PIECE = 4  # a process takes this number of batches at a time


def write_picture(path: Path, picture: Image.Image, metadata: Mapping[str, Any]) -> None:
    """Write a picture atomically, as WebP or PNG by its name's ending, with `metadata` (JSON values) in the file."""
    text = json.dumps(metadata, sort_keys=True)
    if path.suffix == ".webp":
        exif = Image.Exif()
        exif[_DESCRIPTION] = text
        write_image(path, picture, lossless=True, exif=exif)
    else:
        info = PngInfo()
        info.add_text(KEY, text)
        write_image(path, picture, pnginfo=info)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that `write_picture` put into a picture; UserError if there is none."""
    picture = open_picture(path)
    try:
        metadata = json.loads(picture.getexif()[_DESCRIPTION] if path.suffix == ".webp" else picture.info[KEY])
    except Exception as error:  # Pillow's EXIF parser raises whatever it comes across
        raise UserError(
            f"{path} has no record of how it was made: it is not a picture of `prunekit generate`"
        ) from error
    return metadata


@dataclass(frozen=True)
class Request:
    """Prompts with their seeds, one per picture, and the settings with which all pictures are drawn.

    guidance: guidance scale; None: the mixture's default. size: pixels (height, width); None: the model's default size.
    picture_format: "png" or "webp".
    """

    prompts: list[str]
    seeds: list[int]
    steps: int = 25
    guidance: float | None = None
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    batch_size: int = 1
    picture_format: str = "png"

    def __post_init__(self):
        if len(self.prompts) != len(self.seeds) or not self.prompts:
            raise UserError(f"one seed per prompt is needed: {len(self.prompts)} prompts, {len(self.seeds)} seeds")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.picture_format not in FORMATS:
            raise UserError(f"picture_format={self.picture_format!r}: choose one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Source:
    """Arguments of `PromptRoutedPipeline.from_pretrained`, with which another node opens the same pipeline."""

    directory: str
    method: str | None = None
    max_resident: int | None = None

    def open(self) -> PromptRoutedPipeline:
        """Return the pipeline, without progress bars."""
        pipeline = PromptRoutedPipeline.from_pretrained(self.directory, self.method, max_resident=self.max_resident)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def generate_to(
    directory: Path,
    pipeline: PromptRoutedPipeline,
    request: Request,
    weights: str | None = None,
    executor: Executor | None = None,
    source: Source | None = None,
) -> list[tuple[Path, int]]:
    """Draw all prompts to `directory`/00000.png …; return each picture's path and expert.

    A picture appears whole or not at all, and an existing picture is not drawn again. The call returns when all
    pictures exist, whichever process drew them.

    Args:
        directory: new, empty, or with pictures of the same request.
        pipeline: routes the prompts; it also draws them if no executor is given.
        request: the prompts, seeds and settings.
        weights: result of `weights_digest`, if it was already called.
        executor: draws with a pipeline that it opens from `source`, which must be given too; by default this process
            draws.
        source: opens the pipeline on the executor's nodes.

    Raises:
        UserError: the directory holds pictures of another request, or other files; or `executor` is given without
            `source`.

    """
    content, leave = _content(pipeline, request, weights), partial(_forget_if_empty, directory)
    sharing = partial(share, locks=directory / WORK)
    if executor is not None:
        if source is None:
            raise UserError("executor is given without source: give source=Source(DIRECTORY) of the same pipeline too")
        asked = {"source": asdict(source), "directory": str(directory.absolute()), "request": asdict(request)}
        sharing = partial(executor.map, locks=directory / WORK, call=Call.of(draw_one, **asked))
    with occupied(directory, lambda others: _claim(directory, content), leave):
        return _generate(directory, pipeline, request, sharing)


@lru_cache(maxsize=1)
def _opened(source: Source) -> PromptRoutedPipeline:
    """Return the pipeline of a source; it stays in memory for the next piece."""
    return source.open()


def draw_one(executor: OnePiece, source: dict[str, Any], directory: str, request: dict[str, Any]) -> None:
    """Draw one piece of a request, on a node of a cluster."""
    size = request["size"]
    asked, folder = Request(**{**request, "size": size and tuple(size)}), Path(directory)
    _generate(folder, _opened(Source(**source)), asked, partial(executor.map, locks=folder / WORK))


def _generate(
    directory: Path, pipeline: PromptRoutedPipeline, request: Request, sharing: Sharing
) -> list[tuple[Path, int]]:
    experts = pipeline.route(request.prompts).tolist()
    paths = [directory / f"{row:05d}.{request.picture_format}" for row in range(len(request.prompts))]
    batches = _batches(experts, request)
    size = request.batch_size * BATCHES_PER_PIECE
    with Progress("generate", len(paths)) as progress:

        def done(rows: list[int]) -> bool:
            return all(paths[row].exists() for row in rows)

        def make(piece: list[list[int]]) -> None:
            for rows in piece:
                if not done(rows):
                    _draw(pipeline, request, rows, paths, experts)
            progress.update(sum(path.exists() for path in paths))

        pieces = []
        for expert, expert_batches in batches.items():
            for start in range(0, len(expert_batches), BATCHES_PER_PIECE):
                part = expert_batches[start : start + BATCHES_PER_PIECE]
                rows = [row for batch in part for row in batch]
                pieces.append(Piece(f"{expert}-{start}-{size}", partial(done, rows), partial(make, part)))
        sharing(pieces)
    return list(zip(paths, experts, strict=True))


def free_directory(base: Path, pipeline: PromptRoutedPipeline, request: Request, weights: str | None = None) -> Path:
    """Return the first of `base`, `base`-2, `base`-3 … that holds no pictures of another request.

    weights: as in `generate_to`.
    """
    content = _content(pipeline, request, weights)
    candidates = (base if number == 1 else base.with_name(f"{base.name}-{number}") for number in count(1))
    return next(folder for folder in candidates if not _differences(folder, content))


def _claim(directory: Path, content: dict[str, Any]) -> None:
    """Record the request in the directory.

    Raises:
        UserError: the directory has another request, whose differences the error names, or other files.

    """
    refuse_foreign(directory, (directory / WORK / REQUEST).is_file(), "generated pictures")
    if different := _differences(directory, content):
        raise UserError(
            f"{directory} holds pictures made with other {', '.join(different)}; give another directory (--output)"
        )
    write_json(directory / WORK / REQUEST, content)


def _content(pipeline: PromptRoutedPipeline, request: Request, weights: str | None) -> dict[str, Any]:
    info, size = pipeline.mixture.info, list(request.size) if request.size else None
    made_by = {
        "recipe": info.get("recipe"),
        "method": info.get("method"),
        "weights": weights or weights_digest(pipeline),
    }
    return {**asdict(request), **made_by, "scheduler": type(pipeline.scheduler).__name__, "size": size}


def _differences(directory: Path, content: dict[str, Any]) -> list[str]:
    """Return the names of the values in which the request recorded in a directory differs from `content`."""
    path = directory / WORK / REQUEST
    earlier = read_json(path) if path.is_file() else content
    return [name for name in content if name in earlier and earlier[name] != content[name]]


def weights_digest(pipeline: PromptRoutedPipeline) -> str:
    """Return a digest of the frozen parts' weights, and of the run's recipe or, without a recipe, the experts' weights.

    It reads these weights, which takes seconds for a large model.
    """
    digest = Fingerprint("weights")
    for name, part in sorted(pipeline.parts.components.items()):
        if isinstance(part, nn.Module):
            digest.add(name).add_module(part)
    if pipeline.mixture.info.get("recipe"):  # the same recipe gives the same experts, which need not be read here
        return digest.add(pipeline.mixture.info["recipe"]).key()
    for index in range(pipeline.num_experts):
        with pipeline.mixture.experts.use(index) as model:
            digest.add(index).add_module(model)
    return digest.key()


def _forget_if_empty(directory: Path) -> None:
    """Remove the record of a request that drew no picture, so that another request can use the directory."""
    if not any(path.suffix[1:] in FORMATS for path in directory.iterdir()):
        shutil.rmtree(directory / WORK, ignore_errors=True)


def _batches(experts: list[int], request: Request) -> dict[int, list[list[int]]]:
    """Return each expert's batches of row indices; an expert's rows are sorted by prompt and seed."""
    batches = {}
    for expert in sorted(set(experts)):
        rows = [row for row, assigned in enumerate(experts) if assigned == expert]
        rows.sort(key=lambda row: (request.prompts[row], request.seeds[row], row))
        batches[expert] = [rows[i : i + request.batch_size] for i in range(0, len(rows), request.batch_size)]
    return batches


def _draw(
    pipeline: PromptRoutedPipeline,
    request: Request,
    rows: Sequence[int],
    paths: Sequence[Path],
    experts: Sequence[int],
) -> None:
    height, width = request.size or (None, None)
    output = pipeline(
        [request.prompts[row] for row in rows],
        request.negative_prompt,
        request.steps,
        request.guidance,
        height,
        width,
        seeds=[request.seeds[row] for row in rows],
        batch_size=request.batch_size,
        experts=[experts[row] for row in rows],
    )
    assert isinstance(output, RoutedOutput)
    common: dict[str, Any] = {
        "negative_prompt": request.negative_prompt,
        "steps": request.steps,
        "guidance": pipeline.mixture.guidance if request.guidance is None else request.guidance,
        "scheduler": type(pipeline.scheduler).__name__,
        "recipe": pipeline.mixture.info.get("recipe"),
        "method": pipeline.mixture.info.get("method"),
        "software": f"prunekit {version('prunekit')}",
    }
    for row, image, expert, macs in zip(rows, output.images, output.experts, output.macs, strict=True):
        details = {"prompt": request.prompts[row], "seed": request.seeds[row], "expert": expert, "macs": macs}
        write_picture(paths[row], image, {**common, **details})
