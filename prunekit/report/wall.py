"""The image wall: pictures of the same prompts and seeds by every model, each with its expert and MACs."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from prunekit.data.picture_files import open_picture
from prunekit.evaluation.generate import REQUEST, read_pictures
from prunekit.evaluation.sheets import PictureRow, expert_note, picture_sheet
from prunekit.report.comparison_table import PROTOCOLS, Cell
from prunekit.report.source import MissingError, Section, Source
from prunekit.runtime.files import read_json
from prunekit.runtime.run_directory import DENSE

MOST_PROMPTS = 24
FEW_MODELS = 5  # with more models, half as many prompts are shown
MOST_PIXELS = 256  # longer side of a large picture, after it is reduced
PLAIN_PIXELS = 96  # longer side up to which a picture is embedded unchanged
MOST_BYTES = 4_500_000  # of all pictures, as they are encoded in the page
Drawn = dict[tuple[str, int], tuple[Path, int]]  # (prompt, seed): (file of the picture, expert)


@dataclass(frozen=True)
class Painter:
    """A model whose pictures are on the wall; `macs` has one figure per expert."""

    name: str
    drawn: Drawn
    macs: list[int]
    routed: bool


def wall(source: Source) -> Section:
    """Return the section. Raises MissingError if no pictures were kept."""
    painters, note = _of_comparison(source) if source.is_comparison else _of_run(source)
    painters = [painter for painter in painters if painter.drawn]
    if not painters:
        raise MissingError("the directory has no pictures (samples/); a copy may lack them")
    shared = _shared(painters)
    cards, size = [], 0
    most = MOST_PROMPTS if len(painters) <= FEW_MODELS else MOST_PROMPTS // 2
    for prompt, seed in chosen(shared, most):
        pictures = [_picture(painter, (prompt, seed)) for painter in painters]
        size += sum(len(picture["data"]) for picture in pictures)
        if size > MOST_BYTES:
            break
        cards.append({"prompt": prompt, "seed": seed, "pictures": pictures})
    if not cards:
        raise MissingError("the models have no prompt in common")
    return Section("wall", "What it looks like", {"cards": cards, "note": note, "count": len(shared)})


def comparison_sheet(source: Source, output: Path, count: int = 8) -> Path | None:
    """Write the wall's first pictures of a comparison as a sheet, one row per model (PNG); return its path.

    count: number of prompts. Returns None, and writes nothing, if no pictures were kept.
    """
    try:
        painters, note = _of_comparison(source)
    except MissingError:
        return None
    painters = [painter for painter in painters if painter.drawn]
    keys = chosen(_shared(painters), count) if painters else []
    if not keys:
        return None
    rows = [PictureRow(painter.name, read_pictures([painter.drawn[key][0] for key in keys])) for painter in painters]
    return picture_sheet(output, rows, [prompt for prompt, _ in keys], f"{source.directory.name}. {note}")


def chosen(keys: list[tuple[str, int]], count: int = MOST_PROMPTS) -> list[tuple[str, int]]:
    """Return at most `count` prompts: half from the start (names), and half from the end (held-out captions)."""
    return keys if len(keys) <= count else keys[: count - count // 2] + keys[-(count // 2) :]


def _shared(painters: list[Painter]) -> list[tuple[str, int]]:
    """Return the prompts and seeds of which every model has a picture."""
    return [key for key in painters[0].drawn if all(key in painter.drawn for painter in painters)]


def pictures_of(folder: Path) -> Drawn:
    """Return the pictures that `evaluation.comparison.sample` wrote to a folder or to its `expert-N` subfolders."""
    pictures: Drawn = {}
    experts = sorted(folder.glob("expert-*"), key=lambda path: int(path.name.partition("-")[2]))
    for directory, expert in [(folder, 0), *((path, int(path.name.partition("-")[2])) for path in experts)]:
        if not (directory / REQUEST).is_file():
            continue
        request = read_json(directory / REQUEST)
        for index, key in enumerate(zip(request["prompts"], request["seeds"], strict=True)):
            if (directory / f"{index:05d}.png").is_file():
                pictures[key] = directory / f"{index:05d}.png", expert
    return pictures


def data_uri(path: Path) -> str:
    """Return a picture as a data URI: a small picture unchanged, a large picture reduced and as WebP."""
    picture = open_picture(path).convert("RGB")
    if max(picture.size) <= PLAIN_PIXELS:
        kind, content = "png", path.read_bytes()
    else:
        picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "webp", quality=85, method=4)
        kind, content = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _of_run(source: Source) -> tuple[list[Painter], str]:
    rows = source.results.get("table", {}).get("rows") or []
    experts = source.results.get("experts", {})
    painters = []
    for row in rows:
        expert_table = experts.get(row["name"])
        macs = [expert["macs"] for expert in expert_table["rows"]] if expert_table else [row["macs"]]
        drawn = pictures_of(source.directory / "samples" / row["name"])
        painters.append(Painter(row["name"], drawn, macs, bool(expert_table)))
    return painters, "Each prompt with the same noise for every model."


def _of_comparison(source: Source) -> tuple[list[Painter], str]:
    cells = [cell for cell in source.cells if cell["cell"]["method"] != DENSE]
    if not cells:
        raise MissingError("no pruned model of the comparison is finished yet")
    first = cells[0]["cell"]
    budgets = list(dict.fromkeys(entry.get("budget") for entry in source.recipe.get("budgets", ())))
    budget = str(budgets[0]) if budgets else first["budget"]
    budget = budget if any(cell["cell"]["budget"] == budget for cell in cells) else first["budget"]
    drawn = [(cell, _drawn_by(source, cell)) for cell in source.cells if cell["cell"]["budget"] in ("", budget)]
    seeds = [cell["cell"]["seed"] for cell, pictures in drawn if pictures and cell["cell"]["method"] != DENSE]
    seed = max(sorted(set(seeds)), key=seeds.count, default=first["seed"])  # with pictures of the most rows
    order, protocols = list(source.recipe.get("methods", ())), ("static", *PROTOCOLS)
    painters, seen = [], set()
    wanted = [(cell, pictures) for cell, pictures in drawn if cell["cell"]["seed"] == seed]

    def place(cell: dict[str, Any]) -> tuple[int, int]:
        name = cell["cell"]["method"]
        rank = -1 if name == DENSE else order.index(name) if name in order else len(order)
        return rank, protocols.index(cell["cell"]["protocol"])

    for cell, pictures in sorted(wanted, key=lambda pair: place(pair[0])):
        name = cell["cell"]["method"]
        if name in seen:  # under another protocol
            continue
        seen.add(name)
        macs = [expert["macs"] for expert in cell["experts"]] or [cell["figures"]["macs"]]
        painters.append(Painter(name, pictures, macs, bool(cell["experts"])))
    return painters, f"Budget {budget}, seed {seed}; each prompt with the same noise for every model."


def _drawn_by(source: Source, cell: dict[str, Any]) -> Drawn:
    """Return the latest pictures of a comparison's cell with held-out prompts; none if they were not kept."""
    of = cell["cell"]
    stem = Cell(of["method"], of["budget"], of["seed"], of["protocol"]).name
    folders = sorted((source.directory / "work").glob(f"{stem}-samples-*"), key=lambda path: path.stat().st_mtime)
    folders = [folder for folder in folders if not folder.name.endswith("-training")]
    return pictures_of(folders[-1]) if folders else {}


def _picture(painter: Painter, key: tuple[str, int]) -> dict[str, Any]:
    path, expert = painter.drawn[key]
    macs = painter.macs[expert]
    note = expert_note(expert, macs)
    note = note if painter.routed else note.partition(" · ")[2]
    return {"model": painter.name, "note": note, "data": data_uri(path)}
