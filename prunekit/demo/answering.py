"""Answer a prompt with pictures of the dense model and of the expert that the router chooses, with times and scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from prunekit.demo.opening import Chosen, architectures_of, example_prompts, open_dense, title_of
from prunekit.runtime.errors import UserError
from prunekit.serving.drawer import Drawer, Picture, open_pipeline
from prunekit.serving.limits import MOST_SEED, Limits, check_whole

LIMITS = Limits(steps=200)
MOST_RESIDENT = 2  # experts in memory


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt.

    dense: picture of the dense model; None if the model is missing. pruned: picture of the expert.
    expert: index of the expert. scores: the router's score of every expert; empty without a router.
    known: False if the prompt encoder knows no word of the prompt, so that the fallback expert draws it.
    """

    prompt: str
    seed: int
    dense: Picture | None
    pruned: Picture
    expert: int
    scores: list[float]
    known: bool


class Demo:
    """A run, a routed export, or a pipeline, opened to answer prompts.

    Args:
        directory: directory of the run, the export or the pipeline.
        method: method of a run whose pruned model is shown; by default the one with a router, else the first.
        device: device of the models; by default a GPU if there is one.

    Raises FileNotFoundError or ValueError, one line, for a folder that holds nothing to show or lacks an expert.

    """

    def __init__(self, directory: str | Path, method: str | None = None, device: str | None = None):
        self.directory = Path(directory)
        self.pipeline = open_pipeline(self.directory, method, device, MOST_RESIDENT)
        self.dense, self.no_dense = open_dense(self.directory, self.pipeline)
        self.title = title_of(self.directory, self.pipeline.mixture.info)
        self._pruned, self._dense = Drawer(self.pipeline), None if self.dense is None else Drawer(self.dense)

    @property
    def has_router(self) -> bool:
        """Whether prompts go to different experts."""
        return self.pipeline.mixture.router is not None

    @cached_property
    def architectures(self) -> list[Chosen | None]:
        """Architecture and cost model of each expert; None for an expert without a record of its cut."""
        return architectures_of(self.directory, self.pipeline)

    @cached_property
    def examples(self) -> list[str]:
        """A few prompts to try."""
        return example_prompts(self.directory, self.pipeline)

    def answer(self, prompt: str, seed: int = 0, steps: int = 25, guidance: float | None = None) -> Answer:
        """Draw a prompt with both models, from the same noise.

        guidance: guidance scale; the run's by default. Raises a one-line ValueError for invalid arguments.
        """
        prompt, seed, steps, guidance = self._checked(prompt, seed, steps, guidance)
        mixture, scores, known = self.pipeline.mixture, [], True
        if mixture.router is not None and mixture.encoder is not None:
            z = mixture.encoder.encode([prompt])  # (1, Z)
            scores, known = mixture.router.scores(z)[0].tolist(), bool((z != 0).any())
        expert = int(self.pipeline.route([prompt])[0])
        settings = (steps, guidance)
        dense = None if self._dense is None else self._dense.draw([prompt], [seed], 0, *settings)[0]
        pruned = self._pruned.draw([prompt], [seed], expert, *settings)[0]
        return Answer(prompt, seed, dense, pruned, expert, scores, known)

    def _checked(self, prompt: str, seed: int, steps: int, guidance: float | None) -> tuple[str, int, int, float]:
        prompt = " ".join(str(prompt or "").split())
        if not prompt:
            raise UserError("the prompt is empty: describe the picture")
        if len(prompt) > LIMITS.letters:
            raise UserError(f"the prompt has {len(prompt):,} letters: at most {LIMITS.letters:,}")
        guidance = self.pipeline.mixture.guidance if guidance is None else guidance
        if not 0 <= guidance <= LIMITS.guidance:
            raise UserError(f"guidance={guidance}: a number from 0 to {LIMITS.guidance:g}")
        seed, steps = check_whole("seed", seed, 0, MOST_SEED), check_whole("steps", steps, 1, LIMITS.steps)
        return prompt, seed, steps, float(guidance)
