"""The trainer on a small regression: accumulation, resumption, milestones, and files after a non-finite loss."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from prunekit.runtime.files import clear_killed, replacing, temporary_for
from prunekit.runtime.randomness import epoch_indices, generator
from prunekit.runtime.tensors import save_tensors
from prunekit.training.checkpoint import Checkpoints
from prunekit.training.trainer import NonFiniteLossError, Trainer, TrainerConfig

SETTINGS = {"steps": 20, "batch_size": 12, "learning_rate": 1e-2, "warmup_steps": 5, "log_every": 1}


class StopError(Exception):
    """Ends a training like a kill, without saving its state."""


@dataclass
class Regression:
    """Objective of a linear regression, with an additional loss term of the whole batch."""

    stop_at: int | None = None
    poison_at: int | None = None
    model: nn.Linear = field(default_factory=lambda: linear())

    @property
    def modules(self):
        return {"model": self.model}

    def batch(self, step):
        if step == self.stop_at:
            raise StopError
        draw = generator(0, "data", step)
        x = torch.randn(SETTINGS["batch_size"], 6, generator=draw)
        y = torch.randn(SETTINGS["batch_size"], 3, generator=draw)
        return x, y * float("nan") if step == self.poison_at else y

    def shared_loss(self, batch):
        return {"mean": self.model(batch[0]).mean().square()}

    def micro_loss(self, batch, positions):
        x, y = batch[0][positions], batch[1][positions]
        return {"error": (self.model(x) - y).square().mean(1).sum() / len(batch[0])}


def linear():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(6, 3)


def train(folder, objective=None, **changes):
    """Return (losses by step, final weights)."""
    objective, rows = objective or Regression(), []
    fit(folder, objective, rows.append, **changes)
    return torch.tensor([row["loss"] for row in rows]), objective.model.weight.detach().clone()


def fit(folder, objective, log=None, **changes):
    """Return the figures of a training without its time."""
    config = TrainerConfig(**{**SETTINGS, **changes})
    return {**Trainer(config, objective, folder, "toy", log).fit(), "seconds": 0}


@pytest.mark.parametrize("micro_batch", [1, 4, 5, 12])
def test_accumulation_changes_nothing(tmp_path, micro_batch):
    losses, weights = train(tmp_path / "whole")
    parts, other = train(tmp_path / "parts", micro_batch=micro_batch)
    assert torch.allclose(losses, parts, atol=1e-5) and torch.allclose(weights, other, atol=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("log_every", [1, 7, 50])
@pytest.mark.parametrize("stop", [1, 7, 19, 20])
def test_killed_and_resumed_ends_where_it_would_have(tmp_path, stop, log_every, ema):
    """Stop at 20 is after the last checkpoint. Once, a training that was killed there lost its loss."""
    changes = {"ema": ema, "checkpoint_minutes": 1e-9, "log_every": log_every}
    straight, killed, resumed = Regression(), Regression(stop_at=stop), Regression()
    figures = fit(tmp_path / "straight", straight, **changes)
    assert figures.keys() == {"steps", "seconds", "loss", "error", "mean"}
    if stop < SETTINGS["steps"]:
        with pytest.raises(StopError):
            fit(tmp_path / "killed", killed, **changes)
    else:
        fit(tmp_path / "killed", killed, **changes)
    assert Checkpoints(tmp_path / "killed").latest()[1]["step"] == stop
    assert fit(tmp_path / "killed", resumed, **changes) == figures
    assert torch.equal(straight.model.weight, resumed.model.weight)


def test_started_again_after_its_last_step_it_returns_the_same_figures(tmp_path):
    """Once, terms were written to checkpoints but not read, so a run killed after its last step lost its loss."""
    first, again = (fit(tmp_path, Regression()) for _ in range(2))
    assert again == first


def test_the_average_of_the_weights_is_what_stays(tmp_path):
    """After step k >= 2, the average is kept with weight min(0.9, k / (9 + k)), as computed here."""
    objective, seen = Regression(), []
    trainer = Trainer(TrainerConfig(**SETTINGS, ema=0.9), objective, tmp_path, "toy")
    trainer.log = lambda row: seen.append(objective.model.weight.detach().clone())  # the weights before averaging
    trainer.fit()
    average = seen[0]
    for k, weight in enumerate(seen[1:], start=2):
        kept = min(0.9, k / (9 + k))
        average = kept * average + (1 - kept) * weight
    assert len(seen) == SETTINGS["steps"]
    torch.testing.assert_close(objective.model.weight.detach(), average, rtol=1e-5, atol=1e-6)
    assert (objective.model.weight - seen[-1]).abs().max() > 1e-3


def test_milestones_see_averaged_weights(tmp_path):
    objective, seen = Regression(), []
    config = TrainerConfig(**SETTINGS, ema=0.9)
    milestones = {20: lambda: seen.append(objective.model.weight.detach().clone())}
    Trainer(config, objective, tmp_path, "toy", milestones=milestones).fit()
    assert len(seen) == 1 and torch.equal(seen[0], objective.model.weight)


def test_a_non_finite_loss_stops_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"step 9 is not finite.*last good checkpoint"):
        train(tmp_path, Regression(poison_at=9), checkpoint_minutes=1e-9)
    tensors, state = Checkpoints(tmp_path).latest()
    assert state["step"] == 9 and all(value.isfinite().all() for value in tensors.values())


def test_the_learning_rate_rises_stays_and_falls(tmp_path):
    config = TrainerConfig(steps=100, batch_size=1, learning_rate=1.0, warmup_steps=10, decay_share=0.4)
    rate = Trainer(config, Regression(), tmp_path).learning_rate
    assert [rate(s) for s in (0, 9, 10, 59, 60, 80)] == pytest.approx([0.1, 1, 1, 1, 1, 0.5])
    assert rate(99) == pytest.approx(1 / 40)


def test_nothing_to_train_is_refused(tmp_path):
    objective = Regression()
    objective.model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        Trainer(TrainerConfig(**SETTINGS), objective, tmp_path)


def test_checkpoints_keep_the_last(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": torch.tensor([step])}, {})
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-00000002", "step-00000003"]
    assert checkpoints.latest()[1]["step"] == 3
    checkpoints.clear()
    assert checkpoints.latest() is None


def test_a_file_is_replaced_whole_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "x[1].safetensors"
    save_tensors(path, {"x": torch.zeros(2)})
    before = path.read_bytes()
    with pytest.raises(StopError), replacing(path) as new:
        new.write_bytes(b"half")
        (new.parent / ".tmpab12cd").write_bytes(b"what safetensors writes before it renames")
        raise StopError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    for killed in (path, tmp_path / "x1.safetensors"):  # x[1] as a pattern matches x1, but is another name
        temporary_for(killed).mkdir()
    clear_killed(path)
    assert sorted(entry.name[:4] for entry in tmp_path.iterdir()) == [".x1.", "x[1]"]


def test_every_epoch_is_a_permutation():
    drawn = torch.cat([epoch_indices(10, 4, 0, step) for step in range(5)])
    assert all(sorted(part.tolist()) == list(range(10)) for part in drawn.split(10))
    assert not torch.equal(drawn[:10], drawn[10:])
    assert torch.equal(epoch_indices(10, 25, 0, 0)[:20], drawn)


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path)
    wider = Regression()
    wider.model = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"checkpoint in .* belongs to another model; choose another directory"):
        train(tmp_path, wider)
