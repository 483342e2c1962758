"""One prompt, two pictures: the dense model's and the expert's that the router chooses, timed, with the scores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from prunekit.demo.opening import Chosen, architectures_of, example_prompts, open_dense, open_pipeline, title_of
from prunekit.runtime.errors import UserError
from prunekit.serving import PromptRoutedPipeline
from prunekit.serving.pipeline import RoutedOutput
from prunekit.serving.requests import MOST_SEED

MOST_STEPS = 200
MOST_GUIDANCE = 30.0
MOST_LETTERS = 1000  # of a prompt


@dataclass(frozen=True)
class Drawn:
    """A picture, the seconds that it took with text encoder and autoencoder, and the MACs of its denoiser calls."""

    image: Image.Image
    seconds: float
    macs: int


@dataclass(frozen=True)
class Answer:
    """What a prompt gives.

    dense: None where the dense model is not here. expert: who drew `pruned`. scores: the router's of every expert;
    empty without a router. known: false where the prompt encoder knows no word, so that the fallback expert draws.
    """

    prompt: str
    seed: int
    dense: Drawn | None
    pruned: Drawn
    expert: int
    scores: list[float]
    known: bool


class Demo:
    """A run, a routed export, or a pipeline, opened to answer prompts.

    Args:
        directory: where it is.
        method: of a run: whose pruned model; by default the one that routes, else the first by name.
        device: where it runs; by default a GPU where there is one.

    Raises FileNotFoundError or ValueError, one line, for a folder that holds nothing to show or lacks an expert.

    """

    def __init__(self, directory: str | Path, method: str | None = None, device: str | None = None):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory} is not a directory; give the directory of a run or an export")
        if device is not None:
            _check_device(device)
        self.pipeline = open_pipeline(self.directory, method, device)
        self.dense, self.no_dense = open_dense(self.directory, self.pipeline)
        self.title = title_of(self.directory, self.pipeline.mixture.info)
        self._warm: set[int | None] = set()

    @property
    def has_router(self) -> bool:
        """Whether prompts go to different experts."""
        return self.pipeline.mixture.router is not None

    @cached_property
    def architectures(self) -> list[Chosen | None]:
        """What each expert keeps, with what counts its cost; None for one that does not say it."""
        return architectures_of(self.directory, self.pipeline)

    @cached_property
    def examples(self) -> list[str]:
        """A few prompts to try."""
        return example_prompts(self.directory, self.pipeline)

    def answer(self, prompt: str, seed: int = 0, steps: int = 25, guidance: float | None = None) -> Answer:
        """Draw a prompt by both models from the same noise.

        guidance: the run's by default. Raises ValueError, one line, for what cannot be drawn.
        """
        prompt, seed, steps, guidance = self._checked(prompt, seed, steps, guidance)
        mixture, scores, known = self.pipeline.mixture, [], True
        if mixture.router is not None and mixture.encoder is not None:
            z = mixture.encoder.encode([prompt])  # (1, Z)
            scores, known = mixture.router.scores(z)[0].tolist(), bool((z != 0).any())
        expert = int(self.pipeline.route([prompt])[0])
        dense = None if self.dense is None else self._draw(self.dense, None, prompt, seed, steps, guidance)
        pruned = self._draw(self.pipeline, expert, prompt, seed, steps, guidance)
        return Answer(prompt, seed, dense, pruned, expert, scores, known)

    def _draw(
        self, pipeline: PromptRoutedPipeline, expert: int | None, prompt: str, seed: int, steps: int, guidance: float
    ) -> Drawn:
        """Draw with one model; its first picture follows an untimed step, which loads it and warms it up."""
        with pipeline.mixture.experts.use(expert or 0):  # loading is not drawing
            if expert not in self._warm:
                pipeline(prompt, None, 1, guidance, seeds=seed)
                self._warm.add(expert)
            started = time.perf_counter()
            output = pipeline(prompt, None, steps, guidance, seeds=seed)
            assert isinstance(output, RoutedOutput)
            return Drawn(output.images[0], time.perf_counter() - started, output.macs[0])

    def _checked(self, prompt: str, seed: int, steps: int, guidance: float | None) -> tuple[str, int, int, float]:
        prompt = " ".join(str(prompt or "").split())
        if not prompt:
            raise UserError("the prompt is empty: describe the picture")
        if len(prompt) > MOST_LETTERS:
            raise UserError(f"the prompt has {len(prompt):,} letters: at most {MOST_LETTERS:,}")
        guidance = self.pipeline.mixture.guidance if guidance is None else guidance
        for name, value, most, least in (("seed", seed, MOST_SEED, 0), ("steps", steps, MOST_STEPS, 1)):
            if not isinstance(value, int | float) or value != int(value) or not least <= value <= most:
                raise UserError(f"{name}={value}: a whole number from {least} to {most}")
        if not 0 <= guidance <= MOST_GUIDANCE:
            raise UserError(f"guidance={guidance}: a number from 0 to {MOST_GUIDANCE:g}")
        return prompt, int(seed), int(steps), float(guidance)


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device}: not usable on this machine ({reason}); omit it, or give cpu") from error
