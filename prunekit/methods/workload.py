"""What a method computes before it can choose, as `prunekit plan` and `prunekit check` count it."""

from dataclasses import dataclass

from prunekit.training.trainer import TrainerConfig


@dataclass(frozen=True)
class Calibration:
    """Samples that a method measures once for a seed; what it learns from them serves every budget.

    Args:
        title: what the stage is called, e.g. "calibration".
        samples: how many samples are measured.
        forward_passes: passes of the dense UNet for one sample; a backward pass to the weights counts as two.
        passes: the same in words, for people.
        training_batch: samples of one forward and backward pass to all weights; None: there are forward passes alone.
        forward_batch: samples of one forward pass, where the method says what else it holds (`calibration_bytes`).

    """

    title: str
    samples: int
    forward_passes: int
    passes: str
    training_batch: int | None = None
    forward_batch: int | None = None

    @property
    def dense_passes(self) -> int:
        """Passes of the dense model for one sample each."""
        return self.samples * self.forward_passes


@dataclass(frozen=True)
class Search:
    """A training under soft gates, repeated for every seed and budget.

    Args:
        training: its steps and batches.
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
        """Passes of the dense model for one sample each."""
        return self.training.steps * self.training.batch_size * self.passes_per_sample


@dataclass(frozen=True)
class MethodWork:
    """Work that a method computes before it chooses; none by default.

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
        """Passes of the dense model for one sample each, of all that it computes."""
        searched = 0 if self.search is None else self.search.dense_passes
        return sum(calibration.dense_passes for calibration in self.calibrations) + searched
