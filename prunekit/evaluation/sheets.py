"""Sheets of pictures: one image with the pictures of several models, a row per model, for the same prompts."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prunekit.runtime.errors import UserError
from prunekit.runtime.files import replacing

CELL = 1.15  # side of a picture in inches
CAPTION_LETTERS = 19  # characters per line of the caption above a picture
CAPTION_LINES = 3
MARGIN = 0.12


@dataclass(frozen=True)
class PictureRow:
    """A model's pictures, uint8 (n, 3, H, W); `notes` go under them, for example "expert 3 · 1.21 G MACs"."""

    label: str
    images: Tensor
    notes: Sequence[str] | None = None


def expert_note(expert: int, macs: int) -> str:
    """Return the note under a routed picture: the expert that made it, and its MACs per denoiser call."""
    if macs < 1e9:
        return f"expert {expert} · {macs / 1e6:.0f} M MACs"
    return f"expert {expert} · {macs / 1e9:.{2 if macs < 1e11 else 0}f} G MACs"


def picture_sheet(path: Path, rows: Sequence[PictureRow], prompts: Sequence[str], title: str | None = None) -> Path:
    """Write a PNG with models as rows and prompts as columns, and return its path.

    Raises ValueError if a row does not have one picture per prompt or, if it has notes, one note per prompt.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows or not prompts:
        raise UserError("a sheet of pictures needs at least one row and one prompt")
    for row in rows:
        for what, count in (("pictures", len(row.images)), ("notes", len(prompts if row.notes is None else row.notes))):
            if count != len(prompts):
                raise UserError(f"row {row.label!r} has {count} {what} for {len(prompts)} prompts")

    captions = [shortened(prompt) for prompt in prompts]
    title = title and plain(title)
    top = 0.15 * max(caption.count("\n") + 1 for caption in captions) + 0.1 + (0.3 if title else 0)
    left = 0.35 + 0.085 * max(len(line) for row in rows for line in row.label.split("\n"))
    lines = [max(note.count("\n") + 1 for note in row.notes) if row.notes else 0 for row in rows]
    heights = [CELL + MARGIN + (0.05 + 0.12 * count if count else 0) for count in lines]
    width, height = left + len(prompts) * (CELL + MARGIN) + MARGIN, top + sum(heights) + MARGIN
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.text(MARGIN / width, 1 - 0.08 / height, title, fontsize=10, weight="bold", va="top")
    y = height - top
    for column, caption in enumerate(captions):
        center = left + column * (CELL + MARGIN) + CELL / 2
        figure.text(center / width, (y + 0.06) / height, caption, fontsize=7.5, ha="center", va="bottom")
    for row, taken in zip(rows, heights, strict=True):
        middle = (y - CELL / 2) / height
        figure.text(
            (left - 0.15) / width, middle, plain(row.label), fontsize=9, ha="right", va="center", linespacing=1.4
        )
        for column, image in enumerate(row.images):
            x = left + column * (CELL + MARGIN)
            axes = figure.add_axes((x / width, (y - CELL) / height, CELL / width, CELL / height))
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="lanczos")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(color="#cccccc", linewidth=0.6)
            if row.notes is not None:
                figure.text(
                    (x + CELL / 2) / width,
                    (y - CELL - 0.05) / height,
                    row.notes[column],
                    fontsize=6.5,
                    ha="center",
                    va="top",
                    color="#555555",
                )
        y -= taken
    return save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> Path:
    """Write a matplotlib figure as PNG, atomically, and return its path."""
    with replacing(path) as new:
        figure.savefig(new, format="png")
    return path


def shortened(prompt: str) -> str:
    """Break a prompt into at most CAPTION_LINES short lines; an ellipsis replaces the words that do not fit."""
    lines = textwrap.wrap(prompt, CAPTION_LETTERS, max_lines=CAPTION_LINES, placeholder=" …")
    return plain("\n".join(lines))


def plain(text: str) -> str:
    """Return a text with its dollar signs escaped, so that matplotlib draws no formula."""
    return text.replace("$", r"\$")
