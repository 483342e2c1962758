"""Sources of prompts: a text file, a shipped list, a data set's validation captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunekit.core.space import near
from prunekit.data.config import load_data, recorded_data
from prunekit.runtime.errors import UserError
from prunekit.runtime.run_directory import read_recipe
from prunekit.serving.pipeline import PromptRoutedPipeline

LISTS = Path(__file__).parent.parent / "assets" / "prompts"


def collect(
    pipeline: PromptRoutedPipeline,
    directory: Path,
    prompts: Sequence[str] = (),
    file: Path | None = None,
    shipped: str | None = None,
    validation: int | None = None,
    extremes: int | None = None,
) -> list[str]:
    """Return all requested prompts, in the order of the arguments.

    Args:
        pipeline: routes validation captions for `extremes`.
        directory: directory of the run, whose data has the validation captions.
        prompts: prompts given as text.
        file: text file with one prompt per line.
        shipped: name of a shipped list.
        validation: number of the run's validation captions; None: none, or all for `extremes`.
        extremes: take only this number of the validation captions each for the cheapest and the most expensive expert;
            see `extreme_prompts`.

    Raises:
        UserError: no prompt is requested, or a source of prompts is faulty.

    """
    for text in prompts:
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"prompt {text!r} is not UTF-8 text")
    texts = [*prompts, *(read_prompts(file) if file else ()), *(shipped_prompts(shipped) if shipped else ())]
    if validation is not None or extremes is not None:
        held = validation_prompts(read_recipe(directory), validation)
        texts += held if extremes is None else extreme_prompts(pipeline, held, extremes)
    if not texts:
        raise UserError(
            "nothing to draw: give --prompt TEXT, --prompts-file FILE with one prompt per line, --list NAME of "
            f"{', '.join(prompt_lists())}, or --validation N"
        )
    return texts


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one per line; empty lines are skipped."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def prompt_lists() -> list[str]:
    """Return the names of the shipped lists."""
    return sorted(path.stem for path in LISTS.glob("*.txt"))


def shipped_prompts(name: str) -> list[str]:
    """Return a shipped list: the captions of the APTP paper's Table 8 (aptp-cc3m, aptp-coco) or 9 (aptp-parti)."""
    if name not in prompt_lists():
        raise UserError(f"no prompt list {name!r}.{near(name, prompt_lists())}")
    return read_prompts(LISTS / f"{name}.txt")


def validation_prompts(settings: dict[str, Any], count: int | None = None) -> list[str]:
    """Return the first `count` held-out captions of a run's data, in the data's order; all if `count` is None.

    settings: the run's recipe.

    Raises:
        UserError: the data has fewer held-out captions than `count`, or none.

    """
    images = load_data(recorded_data(settings["data"]), settings["seed"])
    held = torch.nonzero(images.held_out).flatten().tolist()
    if (count is not None and count > len(held)) or not held:
        raise UserError(
            f"the run's data has {len(held)} held-out captions (data.holdout), but {count or 'some'} were requested"
        )
    return [images.captions[index] for index in held[:count]]


def extreme_prompts(pipeline: PromptRoutedPipeline, prompts: Sequence[str], count: int) -> list[str]:
    """Return up to `count` prompts each of the cheapest and the most expensive expert among those that get prompts.

    The APTP paper's Figure 4 shows such prompts.

    Raises:
        UserError: all prompts go to one expert, or the experts' costs are unknown.

    """
    macs = (pipeline.mixture.info.get("result") or {}).get("macs")
    experts = pipeline.route(prompts).tolist()
    if not macs or len(set(experts)) < 2:
        raise UserError(
            "there is no cheapest and most expensive expert: all prompts go to one expert, or costs are unknown"
        )
    used = sorted(set(experts), key=lambda expert: macs[expert])
    rows = [
        [row for row, assigned in enumerate(experts) if assigned == expert][:count] for expert in (used[0], used[-1])
    ]
    return [prompts[row] for expert_rows in rows for row in expert_rows]
