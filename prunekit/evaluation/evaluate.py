"""`prunekit evaluate`: runs and diffusers pipelines under one protocol, in one table with intervals."""

import csv
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.data.config import DataConfig, load_data, recorded_data
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.images import HELD_OUT, CaptionedImages
from prunekit.evaluation.comparison import Prompts, Sampling, noise_seeds, referred, sample
from prunekit.evaluation.features import Features
from prunekit.evaluation.figures import Seen, figures, refuse
from prunekit.evaluation.protocols import Protocol, ProtocolError, load_data_config, load_protocol
from prunekit.evaluation.table import COLUMNS, COST, NAME, Column, markdown_table
from prunekit.evaluation.targets import Subject, Target, embeddings_of
from prunekit.models import quiet_libraries, resolution_of
from prunekit.runtime.digests import Digests
from prunekit.runtime.engines import executor_of
from prunekit.runtime.errors import UserError
from prunekit.runtime.executors import Call, Executor, OnePiece
from prunekit.runtime.files import write_json, write_text
from prunekit.runtime.precision import resolve_precision
from prunekit.runtime.processes import apart, current
from prunekit.runtime.progress import Saying
from prunekit.runtime.randomness import generator
from prunekit.runtime.run_directory import LOCKS, RECIPE, RESULTS
from prunekit.runtime.work import Sharing, occupied, refuse_foreign

FORMAT = 1
TABLE = "table.md"
HEADING = "# Protocol "  # of the table
FEATURES, PICTURES = "features", "pictures"
BY_KEY = {column.key: column for column in COLUMNS}
NOTE = (
    "MACs are of one denoiser call; for a mixture, the mean over the evaluated prompts. Each figure: value ± "
    "1.96 jackknife errors over the drawn pictures (`docs/evaluation.md`). Figures of other protocols or data "
    "cannot be compared."
)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: its folder, protocol and rows; a row has costs and `figures.figures`."""

    folder: Path
    protocol: Protocol
    rows: list[dict[str, Any]]

    def shown(self) -> tuple[list[dict[str, Any]], list[Column]]:
        """Return the table's rows and columns as text."""
        keys = self.protocol.metrics
        columns = [NAME, *COST, BY_KEY["images"], *(replace(BY_KEY[k], format="", scale=1.0) for k in keys)]
        lines: list[dict[str, Any]] = []
        for row in self.rows:
            line: dict[str, Any] = {column.key: row[column.key] for column in (NAME, *COST, BY_KEY["images"])}
            lines.append({**line, **{key: _text(key, row["figures"][key]) for key in keys}})
        return lines, columns


def evaluate(
    targets: str | Path | Sequence[str | Path],
    protocol: str = "emoji",
    data: str | Path | Mapping[str, Any] | DataConfig | None = None,
    num_images: int | None = None,
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
    say: Callable[[str], Any] = print,
) -> Evaluation:
    """Generate and measure pictures of models under one protocol; write `results.json` and `table.md`.

    Existing pictures and features are not computed again, and several processes may share the generation.

    Args:
        targets: runs' directories (their dense model and every method), diffusers directories, hub ids, "emoji".
        protocol: "aptp", "bksdm" or "emoji" (`protocols.PROTOCOLS`).
        data: captioned pictures, as for `protocols.load_data_config`; by default the held-out captions of the runs'
            data, or the embedded data under protocol emoji.
        num_images: number of pictures per model; by default the protocol's.
        overrides: `key=value` texts that change the protocol's settings.
        output: directory of pictures and tables; runs/evaluate-PROTOCOL by default.
        say: function that is called with one line per finished step.

    Raises:
        ValueError: invalid input; the message is one line. Faults are found before pictures are generated, if possible.
        ImportError: a metric needs a package that is missing; the message names the extra.

    """
    quiet_libraries()
    given = [targets] if isinstance(targets, str | Path) else list(targets)
    if not given:
        raise UserError("nothing to evaluate: give a run, a diffusers directory, a hub id, or emoji")
    settings = load_protocol(protocol, overrides, num_images)
    settings = settings.model_copy(update={"precision": resolve_precision(settings.precision, current().device)})
    places = [Target.at(place) for place in given]
    folder = Path(output or Path("runs") / f"evaluate-{protocol}")
    tidy = partial(shutil.rmtree, folder / LOCKS, ignore_errors=True)
    with occupied(folder, lambda others: _claim(folder), tidy), executor_of(settings.engine, Saying(say)) as executor:
        return _evaluate(settings, places, data, folder, say, executor)


def _claim(folder: Path) -> None:
    """Raise UserError if a directory holds anything other than an evaluation."""
    table = folder / TABLE
    ours = [table.is_file() and table.read_text(encoding="utf-8", errors="replace").startswith(HEADING)]
    ours += [(folder / name).is_dir() for name in (FEATURES, PICTURES)]  # of an evaluation that was stopped
    refuse_foreign(folder, any(ours) and not (folder / RECIPE).is_file(), "evaluation")


def _evaluate(
    settings: Protocol,
    places: list[Target],
    data: str | Path | Mapping[str, Any] | DataConfig | None,
    folder: Path,
    say: Callable[[str], Any],
    executor: Executor,
) -> Evaluation:
    """Generate and measure pictures in a directory that this command has claimed."""
    digests = Digests(folder / "cache")
    features = Features(folder / FEATURES, digests)
    prompts, source = _prompts(settings, places, data, folder / "cache")
    refuse(settings, features, prompts)
    if len(prompts.prompts) < settings.num_images:
        say(f"There are {len(prompts.prompts):,} prompts, fewer than num_images={settings.num_images:,}")
    asked: dict[str, Any] = {
        "protocol": settings.model_dump(mode="json"),
        "places": [place.place for place in places],
        "data": None if data is None else load_data_config(data).model_dump(mode="json"),
        "folder": str(folder.absolute()),
    }
    rows: list[dict[str, Any]] = []
    with apart():
        for place_index, place in enumerate(places):
            for index, subject in enumerate(place.subjects(settings, digests)):
                call = Call.of(draw_one, asked=asked, place=place_index, subject=index)
                sharing = partial(executor.map, locks=folder / LOCKS, call=call)
                rows.append(_row(subject, settings, features, prompts, folder, sharing))
                name, taken = rows[-1]["name"], {row["name"] for row in rows[:-1]}
                if len(places) > 1 and place.recipe is not None:
                    name = f"{place.name} {name}"
                rows[-1] |= {"name": f"{place.place} {name}" if name in taken else name, "target": place.place}
                summary = ", ".join(f"{key} {_text(key, figure)}" for key, figure in rows[-1]["figures"].items())
                say(f"{rows[-1]['name']}: {summary}")
    done = Evaluation(folder, settings, rows)
    real = 0 if prompts.images is None else prompts.images.num_images
    write_json(
        folder / RESULTS,
        {
            "format": FORMAT,
            "protocol": settings.model_dump(mode="json"),
            "data": source,
            "references": real,
            "rows": rows,
        },
    )
    _write_table(done, source, real)
    return done


@dataclass(frozen=True)
class Drawn:
    """The pictures of one model."""

    prompts: Prompts  # with the embeddings for the model's router
    folder: Path
    files: list[Path]
    experts: Tensor  # (n,) of the prompts


def _draw(subject: Subject, protocol: Protocol, prompts: Prompts, folder: Path, sharing: Sharing) -> Drawn:
    """Generate one model's pictures."""
    candidate, pipeline = subject.candidate, subject.pipeline
    options = (protocol.steps, protocol.guidance, protocol.batch_size, protocol.precision)
    sampling = Sampling(*options, protocol.resolution)
    prompts = replace(prompts, embeddings=embeddings_of(subject, prompts.prompts))
    key = Fingerprint(subject.key, asdict(sampling), prompts.seeds).add_texts(prompts.prompts).key()
    pictures = folder / PICTURES / f"{candidate.name}-{key[:12]}"
    return Drawn(prompts, pictures, *sample(candidate, pipeline, prompts, sampling, pictures, sharing))


@lru_cache(maxsize=1)
def _opened(asked: str) -> tuple[Protocol, Prompts]:
    """Return an evaluation's settings and prompts, cached for the next batch."""
    content = json.loads(asked)
    protocol, data = Protocol(**content["protocol"]), content["data"]
    places = [Target.at(place) for place in content["places"]]
    config = None if data is None else DataConfig.model_validate(data)
    return protocol, _prompts(protocol, places, config, Path(content["folder"]) / "cache")[0]


@lru_cache(maxsize=1)
def _opened_subjects(asked: str, place: int) -> list[Subject]:
    """Return the models at a place, cached for the next batch."""
    content = json.loads(asked)
    digests = Digests(Path(content["folder"]) / "cache")
    return list(Target.at(content["places"][place]).subjects(_opened(asked)[0], digests))


def draw_one(executor: OnePiece, asked: dict[str, Any], place: int, subject: int) -> None:
    """Generate one batch of a model's pictures, on a node of a cluster."""
    quiet_libraries()
    key, folder = json.dumps(asked), Path(asked["folder"])
    (protocol, prompts), model = _opened(key), _opened_subjects(key, place)[subject]
    with apart():
        _draw(model, protocol, prompts, folder, partial(executor.map, locks=folder / LOCKS))


def _row(
    subject: Subject, protocol: Protocol, features: Features, prompts: Prompts, folder: Path, sharing: Sharing
) -> dict[str, Any]:
    """Generate and measure one model's pictures, and return the model's row."""
    candidate, size = subject.candidate, protocol.compare_at or protocol.resolution or resolution_of(subject.pipeline)
    drawn = _draw(subject, protocol, prompts, folder, sharing)
    macs = float(torch.tensor(candidate.macs, dtype=torch.float64)[drawn.experts].mean())
    return {
        "name": candidate.name,
        "params": candidate.used_params(),
        "macs": round(macs),
        "macs_ratio": macs / subject.dense_macs if subject.dense_macs else None,
        "images": len(drawn.files),
        "protocol": protocol.name,
        "pictures": str(drawn.folder.relative_to(folder)),
        "figures": figures(Seen(protocol, features, drawn.prompts, drawn.files, size)),
    }


def _prompts(
    protocol: Protocol, places: Sequence[Target], data: Any, cache: Path
) -> tuple[Prompts, dict[str, Any] | str]:
    """Return the prompts, and their source: the data's settings, or the path of the file of prompts."""
    recipes = [place.recipe for place in places if place.recipe is not None]
    seeds = {recipe.get("seed", 0) for recipe in recipes} if data is None and protocol.seed is None else set()
    if len(seeds) > 1:
        raise ProtocolError(
            f"the runs have seeds {sorted(seeds)}, which hold out different captions: give --data or seed=N"
        )
    seed = protocol.seed if protocol.seed is not None else seeds.pop() if seeds else 0
    if protocol.prompts is not None:
        texts = read_prompts(Path(protocol.prompts).expanduser())[: protocol.num_images]
        targets = torch.zeros(len(texts), dtype=torch.long)
        nothing = torch.zeros(len(texts), 1)
        return Prompts(None, texts, targets, 0, noise_seeds(seed, len(texts)), nothing), protocol.prompts
    config = _own_data(protocol, recipes) if data is None else load_data_config(data)
    images = load_data(config, seed, cache)
    content = config.model_dump(mode="json", exclude_defaults=True) or {"kind": config.kind}
    of_runs = data is None and bool(recipes)
    split = HELD_OUT if of_runs and images.holds_pictures else None
    if protocol.ask == "names":
        return Prompts.choose(images, protocol.num_images, seed, None, protocol.num_references, split), content
    return _captions(protocol, images.of_split(split), seed, held_only=of_runs), content


def _own_data(protocol: Protocol, recipes: Sequence[dict[str, Any]]) -> DataConfig:
    """Return the data of the runs, or the embedded data under protocol emoji."""
    configs = [recorded_data(recipe.get("data") or {}) for recipe in recipes]
    if any(config != configs[0] for config in configs):
        raise ProtocolError("the runs have different data: give --data for all of them")
    if configs:
        return configs[0]
    if protocol.name != "emoji":
        raise ProtocolError(
            f"protocol {protocol.name} needs captioned pictures: give --data, such as "
            '"{kind: coco, path: coco, split: val30k}", or prompts=FILE'
        )
    return DataConfig(holdout_by="captions")  # no run held out pictures, so prompts may ask for any picture


def _captions(protocol: Protocol, images: CaptionedImages, seed: int, held_only: bool) -> Prompts:
    """Choose one caption per picture; with `held_only`, only captions that no training sees."""
    pairs = torch.nonzero(images.held_out).flatten() if held_only else torch.arange(images.num_pairs)
    if not len(pairs):
        raise UserError("the run's data has no held-out captions (data.holdout=0): give --data with other captions")
    pairs = pairs[torch.randperm(len(pairs), generator=generator(seed, "evaluation captions"))]
    of_picture = dict(zip(images.image_index[pairs].tolist(), pairs.tolist(), strict=True))
    chosen = list(of_picture.values())[: protocol.num_images]
    texts, targets = [images.captions[pair] for pair in chosen], images.image_index[torch.tensor(chosen)]
    order = torch.randperm(images.num_images, generator=generator(seed, "evaluation names"))
    images, targets = referred(images, targets, order, protocol.num_references)
    return Prompts(images, texts, targets, 0, noise_seeds(seed, len(texts)), torch.zeros(len(texts), 1))


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one per line, or of the column `Prompt` of a .tsv (PartiPrompts).

    Raises ValueError, one line, for a file that cannot be read or holds fewer than two prompts.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path} cannot be read: {error}") from error
    lines: Iterable[str] = text.splitlines()
    if path.suffix == ".tsv":
        lines = (row.get("Prompt") or "" for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) < 2:
        raise UserError(f"prompts={path} holds {len(prompts)} prompts: give one prompt per line, at least two")
    return prompts


def _text(key: str, figure: Mapping[str, float]) -> str:
    column, half = BY_KEY[key], (figure["high"] - figure["low"]) / 2
    return f"{column.show({key: figure['value']})} ± {column.show({key: half})}"


def _said(source: dict[str, Any] | str) -> str:
    if isinstance(source, str):
        return f"prompts of {source}"
    return f"data {', '.join(f'{key}={value}' for key, value in source.items())}"


def _write_table(done: Evaluation, source: Any, real: int) -> None:
    protocol = done.protocol
    size = f"{protocol.resolution} px" if protocol.resolution else "the model's own size"
    size += f", measured at {protocol.compare_at} px" if protocol.compare_at else ""
    scheduler = "PNDM" if protocol.scheduler == "pndm" else "the pipeline's scheduler"
    how = f"{scheduler}, {protocol.steps} steps, guidance {protocol.guidance:g}, {protocol.precision}"
    models = {"cmmd": protocol.cmmd_model, "pick_score": protocol.pick_model}
    models |= dict.fromkeys(("kid", "frechet"), protocol.feature_model)
    used = ", ".join(f"{key} by {models.get(key, protocol.clip_model)}" for key in protocol.metrics)
    lines, columns = done.shown()
    parts = [
        f"{HEADING}{protocol.name}\n",
        f"{size}; {how}; {_said(source)}, {real:,} real pictures; {used}.\n",
        markdown_table(lines, columns),
        NOTE,
    ]
    path = done.folder / TABLE
    write_text(path, "\n".join(parts) + "\n")
