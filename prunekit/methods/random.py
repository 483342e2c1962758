"""Random pruning: the baseline that every other method has to beat.

Whole layers are removed at random too, if `depth` makes them units. The random baseline of APTP's published code keeps
all layers, as `depth: none` does here.
"""

import torch
from diffusers import DiffusionPipeline, ModelMixin

from prunekit.methods.base import Dataset, ScoreMethod, space_of
from prunekit.methods.budget import Scores
from prunekit.methods.registry import register
from prunekit.runtime.randomness import generator


@register("random")
class Random(ScoreMethod):
    """Remove units at random, widths and whole layers alike, without data."""

    needs_data = False

    def score(self, pipeline: DiffusionPipeline | ModelMixin, dataset: Dataset | None = None) -> Scores:
        """Return scores uniform in [0, 1), independent of each other, for widths and depths alike.

        Args:
            pipeline: a pipeline or its UNet, which may be on the meta device.
            dataset: not used.

        Raises:
            ValueError: units that the settings name and the UNet lacks.

        """
        space = space_of(pipeline, self.config)
        with torch.device("cpu"):
            values = torch.rand(space.size, dtype=torch.float64, generator=generator(self.config.seed, "random scores"))
        return Scores(space, values, self.score_info())
