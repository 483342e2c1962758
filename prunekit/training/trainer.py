"""The one training loop: pre-training, search and fine-tuning differ only in their objective.

A step is defined on the *global* batch. An objective returns the batch of step s (the same on every process), the terms
that need the whole batch, and the sum of its per-sample terms over any positions. So neither gradient accumulation nor
the number of processes changes the loss or the gradient (laws 4 and 5).
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from prunekit.runtime.errors import UserError
from prunekit.runtime.precision import AUTO, Precision, autocast, resolve_precision
from prunekit.runtime.processes import current
from prunekit.runtime.progress import Progress, console
from prunekit.runtime.termination import deferred
from prunekit.training.checkpoint import Checkpoints, flatten_optimizer, restore_optimizer


class TrainerConfig(BaseModel):
    """Settings of a training; the objective is defined elsewhere."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: int = Field(gt=0, description="Number of optimizer steps.")
    batch_size: int = Field(gt=0, le=2**24, description="Samples per step, over all processes.")
    micro_batch: int | None = Field(
        None, gt=0, description="Samples per forward pass; unset: all samples of a process."
    )
    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(0, ge=0, description="Number of steps of the linear warm-up from zero.")
    decay_share: float = Field(
        0.0, ge=0, le=1, description="Fraction of the steps, at the end, over which the learning rate falls to zero."
    )
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Largest global norm of the gradient; unset: no clipping."
    )
    precision: Precision = Field(
        "auto", description=f"Autocast dtype of forward passes; float16 scales the loss. {AUTO}"
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass, for less memory and about a third more time."
    )
    channels_last: bool = Field(
        False, description="Store tensors of convolutions in channels-last layout, which is faster on GPUs."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of the moving average that replaces the weights at the end; unset: no average.",
    )
    checkpoint_minutes: float = Field(2.0, gt=0, description="Minutes between checkpoints.")
    checkpoint_steps: int | None = Field(
        None, gt=0, description="Steps between checkpoints, in addition to checkpoint_minutes; unset: only by minutes."
    )
    keep_checkpoints: int = Field(1, gt=0, description="Number of latest checkpoints to keep during training.")
    log_every: int = Field(10, gt=0, description="Steps between log rows.")


Log = Callable[[dict[str, Any]], None]  # takes one row of a run's log


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message says where, and which checkpoint is good."""


class Objective(Protocol):
    """The loss that a training minimizes. Only parameters of `modules` that require gradients are trained."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that are trained, by the names that checkpoints give them."""
        ...

    def batch(self, step: int) -> Any:
        """Return the global batch of a step; the same on every process."""

    def shared_loss(self, batch: Any) -> dict[str, Tensor]:
        """Return the terms that are functions of the whole batch (each a scalar); may be empty."""

    def micro_loss(self, batch: Any, positions: Tensor) -> dict[str, Tensor]:
        """Return the per-sample terms, summed over `positions` (n,); all positions together give the step's loss."""


class Trainer:
    """The training loop; it resumes from its checkpoints and leaves the trained (or averaged) weights in the modules.

    `milestones` maps a step to a function that is called after it, with the averaged weights in the modules.
    """

    def __init__(
        self,
        config: TrainerConfig,
        objective: Objective,
        directory: Path,
        title: str = "train",
        log: Log | None = None,
        milestones: Mapping[int, Callable[[], None]] | None = None,
    ):
        self.config, self.objective, self.title = config, objective, title
        self.log = log or (lambda row: None)
        self.milestones = dict(milestones or {})
        self.processes = current()
        self.checkpoints = Checkpoints(directory, config.keep_checkpoints)
        if config.batch_size < self.processes.count:
            raise UserError(
                f"{title}: batch_size={config.batch_size} is smaller than the {self.processes.count} processes; "
                "raise it, or start fewer processes"
            )
        self.parameters = [p for m in objective.modules.values() for p in m.parameters() if p.requires_grad]
        if not self.parameters:
            raise UserError(f"{title}: nothing to train, every parameter is frozen")
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.average = EMAModel(self.parameters, decay=config.ema, foreach=True) if config.ema else None
        self.precision = resolve_precision(config.precision, self.processes.device)
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=self.precision == "float16")

    def learning_rate(self, step: int) -> float:
        """Return the rate of `step` (0-based): linear warm-up, constant, linear decay over the last `decay_share`."""
        config = self.config
        rise = (step + 1) / config.warmup_steps if step < config.warmup_steps else 1.0
        fall_steps = config.decay_share * config.steps
        fall = min(1.0, (config.steps - step) / fall_steps) if fall_steps else 1.0
        return config.learning_rate * min(rise, fall)

    def fit(self) -> dict[str, float]:
        """Run the remaining steps; return "steps" and "seconds" of the whole training, the last "loss" and its terms.

        Raises:
            NonFiniteLossError: the loss is not finite; the last checkpoint is not changed.

        """
        step, seconds, terms = self._restore()
        progress = Progress(self.title, self.config.steps, step, enabled=self.processes.is_main)
        last = last_save = time.monotonic()
        with progress, deferred() as termination:
            while step < self.config.steps:
                unread, stop = self._step(step, termination.requested)
                step += 1
                now = time.monotonic()
                seconds, last = seconds + now - last, now
                saves = stop or self._is_due(step, now - last_save)
                if saves or self._is_read(step):
                    terms = self._read(step, unread)
                    self._log(step, seconds, terms)
                    progress.update(step, terms["loss"])
                if step in self.milestones:
                    self._reach(step)
                if saves:
                    self._save(step, seconds, terms)
                    last_save = time.monotonic()
                if stop and step < self.config.steps:
                    console.print(f"{self.title}: stopped by a signal; saved step {step} in {self.checkpoints.folder}")
                    termination.leave()
        if self.average is not None:
            self.average.copy_to(self.parameters)
        self.processes.wait()  # the main process may still be writing
        return {"steps": step, "seconds": seconds, **terms}

    def _log(self, step: int, seconds: float, terms: dict[str, float]) -> None:
        if self.processes.is_main and (step % self.config.log_every == 0 or step == self.config.steps):
            row = {"stage": self.title, "step": step, **terms, "rate": self.learning_rate(step - 1)}
            self.log({**row, "seconds": round(seconds, 2)})

    def _is_due(self, step: int, seconds: float) -> bool:
        """Return whether a checkpoint is due after `step` steps, `seconds` after the last one."""
        config = self.config
        by_steps = config.checkpoint_steps is not None and step % config.checkpoint_steps == 0
        return by_steps or seconds > 60 * config.checkpoint_minutes or step == config.steps

    def _is_read(self, step: int) -> bool:
        """Return whether to read the terms after `step` steps; reading makes the host wait for the device."""
        waits = self.processes.device.type != "cpu"
        return not waits or step % self.config.log_every == 0 or step in self.milestones or step == self.config.steps

    def _read(self, step: int, unread: dict[str, Tensor]) -> dict[str, float]:
        """Return the terms of the last of `step` steps as numbers, and "loss", their sum.

        Raises:
            NonFiniteLossError: the loss is not finite.

        """
        terms = {name: float(value) for name, value in unread.items()}
        loss = sum(terms.values())
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"{self.title}: the loss of step {step - 1} is not finite ({terms}); the last good checkpoint is in "
                f"{self.checkpoints.folder}; lower the learning rate or use precision=float32, then resume"
            )
        return {"loss": loss, **terms}

    def _step(self, step: int, stop: bool) -> tuple[dict[str, Tensor], bool]:
        """Run a step without waiting for the device; return its terms, and whether any process was asked to stop."""
        config, processes = self.config, self.processes
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        batch = self.objective.batch(step)
        shared = self.objective.shared_loss(batch)
        if shared:
            self.scaler.scale(_total(shared) / processes.count).backward()
        sums: dict[str, Tensor] = {}
        mine = torch.arange(config.batch_size).tensor_split(processes.count)[processes.index]
        for positions in mine.split(config.micro_batch or config.batch_size):
            with autocast(self.precision, processes.device):
                micro = self.objective.micro_loss(batch, positions)
            if micro:
                self.scaler.scale(_total(micro)).backward()
            for name, value in micro.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        stopping = self._reduce(sums, stop)
        self.scaler.unscale_(self.optimizer)
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.step(self.parameters)
        return {name: value.detach() for name, value in {**sums, **shared}.items()}, stopping

    def _reach(self, step: int) -> None:
        """Call a milestone with the averaged weights in place."""
        if self.average is not None:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)
        self.milestones[step]()
        if self.average is not None:
            self.average.restore(self.parameters)

    def _reduce(self, sums: dict[str, Tensor], stop: bool) -> bool:
        """Sum the terms and the gradients over the processes, in place; return whether any process asks to stop."""
        if self.processes.count == 1:
            return stop
        used = [float(parameter.grad is not None) for parameter in self.parameters]
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.processes.sum(gradients)
        flags = torch.tensor([float(stop), *used], device=self.processes.device)
        packed = torch.cat([*(value.float().view(1) for value in sums.values()), flags])
        self.processes.sum([packed])
        sums.update(zip(sums, packed, strict=False))
        stopping, *users = packed[len(sums) :].tolist()
        for parameter, count in zip(self.parameters, users, strict=True):
            if not count:  # used by no process: the optimizer skips it, as it would in one process
                parameter.grad = None
        return stopping > 0

    def _save(self, step: int, seconds: float, terms: dict[str, float]) -> None:
        tensors = {f"parameter.{i}": p for i, p in enumerate(self.parameters)} | flatten_optimizer(self.optimizer)
        if self.average is not None:
            tensors |= {f"average.{i}": p for i, p in enumerate(self.average.shadow_params)}
        if self.processes.is_main:
            state = {"seconds": seconds, "terms": terms, "scaler": self.scaler.state_dict()}
            self.checkpoints.save(step, tensors, state)

    def _restore(self) -> tuple[int, float, dict[str, float]]:
        """Load the newest checkpoint, if there is one; return its step, seconds and terms."""
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            return 0, 0.0, {}
        tensors, state = checkpoint
        kept = [tensors.get(f"parameter.{index}") for index in range(len(self.parameters))]
        if any(tensor is None or tensor.shape != p.shape for tensor, p in zip(kept, self.parameters, strict=True)):
            raise UserError(
                f"{self.title}: the checkpoint in {self.checkpoints.folder} belongs to another model; choose "
                "another directory, or remove the checkpoint"
            )
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"parameter.{index}"])
        restore_optimizer(self.optimizer, tensors)
        if self.average is not None:
            self.average.shadow_params = [tensors[f"average.{i}"].to(p.device) for i, p in enumerate(self.parameters)]
            self.average.optimization_step = state["step"]
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        return state["step"], state["seconds"], state["terms"]


def _total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.float() for value in terms.values()]).sum()
