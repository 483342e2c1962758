"""Work of a method before it chooses, as `prunekit plan` and `prunekit check` count it."""

from dataclasses import dataclass

from prunekit.training.trainer import TrainerConfig


@dataclass(frozen=True)
class Calibration:
    """Samples that a method measures once per seed; the measurements serve every budget.

    Args:
        title: name of the stage, e.g. "calibration".
        samples: number of measured samples.
        forward_passes: passes of the dense UNet for one sample; a backward pass to the weights counts as two.
        passes: the forward passes in words, for people.
        training_batch: samples per forward and backward pass to all weights; None: there are only forward passes.
        forward_batch: samples per forward pass, if the method states its other memory (`calibration_bytes`).

    """

    title: str
    samples: int
    forward_passes: int
    passes: str
    training_batch: int | None = None
    forward_batch: int | None = None

    @property
    def dense_passes(self) -> int:
        """Number of passes of the dense model, one sample each."""
        return self.samples * self.forward_passes


@dataclass(frozen=True)
class Search:
    """A training under soft gates, repeated for every seed and budget.

    Args:
        training: steps and batches of the training.
        has_teacher: whether the ungated UNet runs on every sample too.

    """

    training: TrainerConfig
    has_teacher: bool

    @property
    def passes_per_sample(self) -> int:
        """Passes of the dense model for one sample: forward, backward to the gates, and what the settings add."""
        return 2 + self.training.gradient_checkpointing + self.has_teacher

    @property
    def dense_passes(self) -> int:
        """Number of passes of the dense model, one sample each."""
        return self.training.steps * self.training.batch_size * self.passes_per_sample


@dataclass(frozen=True)
class MethodWork:
    """Work of a method before it chooses; none by default.

    Args:
        calibrations: in the order in which they run.
        search: the training that learns the architectures; None: there is none.
        memory_setting: name of the method's setting to lower where this work does not fit into memory; None: no setting
            helps.

    """

    calibrations: tuple[Calibration, ...] = ()
    search: Search | None = None
    memory_setting: str | None = None

    @property
    def dense_passes(self) -> int:
        """Number of passes of the dense model, one sample each, of all this work."""
        searched = 0 if self.search is None else self.search.dense_passes
        return sum(calibration.dense_passes for calibration in self.calibrations) + searched
