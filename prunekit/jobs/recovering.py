"""Recovery of a method's architectures: each is sliced, refitted and fine-tuned, or all are slices of one backbone.

experts/0/unet 1/unet …            each model, in its stock form if it has one; the folder is named
                                   like the pipeline's attribute that holds the model
experts/0/refitted/unet            the model after the closed-form refit, until it is fine-tuned
experts/0/refit.json               errors of each layer before and after the refit
experts/backbone/unet              with `fine_tune.shared_backbone`: the weights, to which the experts' folders point
"""

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from prunekit.core.cost import CostModel
from prunekit.core.family import NoiseProcess
from prunekit.core.registry import denoiser_in, denoiser_name, process_of
from prunekit.core.slicing import export_model, load_model, save_member, slice_model
from prunekit.core.timesteps import slice_folder, write_bins
from prunekit.evaluation.comparison import Candidate, StoredModels, shares_of
from prunekit.jobs.stages import Stages
from prunekit.methods.result import PruneResult
from prunekit.recovery.backbone import BackboneObjective, Member, Mixture
from prunekit.recovery.closed_form import ClosedFormConfig, refit
from prunekit.recovery.deltas import Deltas
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective, fine_tune
from prunekit.recovery.in_memory import BACKBONE, kept_objective, mixture_of, routed_pairs, shares_backbone
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_folder, write_json
from prunekit.runtime.processes import apart, current
from prunekit.runtime.work import Piece, Sharing, do_together
from prunekit.training.checkpoint import Checkpoints

FIGURES, REFIT = "figures.json", "refit.json"
REFITTED = "refitted"
Begins = Callable[[str, int, bool], None]  # takes a method's name, a model's index, and whether its fine-tuning begins


@dataclass(frozen=True)
class Recovery:
    """A method's architectures to recover in a folder."""

    name: str
    result: PruneResult
    folder: Path
    config: FineTuneConfig
    seed: int
    closed_form: ClosedFormConfig | None = None  # settings of the refit before fine-tuning; None: no refit
    fine_tunes: bool = True
    dense_passes: int = 0  # compute of the method's choice, in forward passes of the dense model on a sample
    shares_steps: bool = False  # steps of experts without prompts go to the other experts

    @property
    def shares(self) -> bool:
        """Whether its architectures share one set of weights."""
        return shares_backbone(self.result, self.config)


@dataclass(frozen=True)
class Job:
    """One denoiser to recover, independent of all others: expert `index`, or the backbone of all (None)."""

    recovery: Recovery
    index: int | None
    pairs: Tensor  # (P_i,) training pairs
    part: str  # name of the model's folder: the attribute of a pipeline that holds the model
    config: FineTuneConfig
    mixture: Mixture | None = None  # only for a backbone

    @property
    def folder(self) -> Path:
        """Folder of the model."""
        return self.recovery.folder / (BACKBONE if self.index is None else str(self.index))

    @property
    def title(self) -> str:
        """Name of the model in messages."""
        return f"{self.recovery.name} {BACKBONE if self.index is None else self.index}"

    @property
    def lock(self) -> str:
        """The name of its lock file."""
        return re.sub(r"\W", "-", self.title)

    @property
    def trains(self) -> bool:
        """Whether the model is fine-tuned; a model without training pairs is not."""
        return bool(len(self.pairs)) and self.recovery.fine_tunes

    @property
    def trains_all(self) -> bool:
        """Whether all of its weights are trained."""
        return self.trains and self.config.lora is None

    def done(self) -> bool:
        """Return whether the model exists."""
        return (self.folder / self.part).is_dir()


class Recovering:
    """Recoveries of several methods: slice architectures, refit and fine-tune each on the prompts routed to it.

    The models are a queue of independent jobs, shared by the processes of this launch and of others on the directory.
    A launch with more processes than models trains the models one after another, each with all its processes.
    """

    def __init__(
        self, stages: Stages, recoveries: Sequence[Recovery], begins: Begins = lambda name, index, trains: None
    ):
        """Prepare the jobs of the recoveries; `begins` is called when the refit or fine-tuning of a model begins."""
        self.stages, self.recoveries, self.begins = stages, recoveries, begins
        self.jobs_of = [_jobs(stages, recovery) for recovery in recoveries]

    def train(self, meanwhile: Callable[[Candidate], None] | None = None, sharing: Sharing | None = None) -> None:
        """Recover the models that are missing.

        meanwhile: called with the dense model, and with each candidate whose models exist, while this process finds no
            model to recover and others still train. A second call for the same candidate must do nothing.
        sharing: function that does the queue's pieces; by default the processes of the directory share them.
        """
        jobs = list(chain.from_iterable(self.jobs_of))
        pieces = [Piece(job.lock, job.done, partial(_fine_tune, self.stages, job, self.begins)) for job in jobs]
        if len(jobs) < current().count:
            for piece in pieces:
                do_together(piece, self.stages.locks)
            return
        with apart():
            if meanwhile is not None:
                pieces.append(_follow(lambda: [self.stages.dense], [], jobs, meanwhile))
                for recovery, needed in zip(self.recoveries, self.jobs_of, strict=True):
                    make = partial(_recovered, self.stages, recovery, needed)
                    pieces.append(_follow(make, needed, jobs, meanwhile))
            if missing := [job for job in jobs if not job.done()]:  # another node may recover them
                first = missing[0].recovery
                self.begins(first.name, missing[0].index or 0, first.closed_form is None)
            (sharing or self.stages.share)(pieces)

    def candidates(self) -> list[Candidate]:
        """Return the recovered models, which must all exist, as candidates: one per kept step of each recovery."""
        of_each = zip(self.recoveries, self.jobs_of, strict=True)
        return [candidate for each, jobs in of_each for candidate in _recovered(self.stages, each, jobs)]


def recover(stages: Stages, recovery: Recovery) -> Candidate:
    """Return the candidate of a recovery's last step; recover its models if they are missing."""
    recovering = Recovering(stages, [recovery])
    recovering.train()
    return recovering.candidates()[-1]


def _follow(
    candidates: Callable[[], list[Candidate]],
    needed: Sequence[Job],
    jobs: Sequence[Job],
    meanwhile: Callable[[Candidate], None],
) -> Piece:
    """Return the piece that calls `meanwhile` with candidates once `needed` are done; skip it once all `jobs` are."""
    finished: list[Candidate] = []

    def follow() -> None:
        for candidate in candidates():
            meanwhile(candidate)
            finished.append(candidate)

    name = f"after-{needed[0].lock}" if needed else "after-dense"
    return Piece(
        name,
        done=lambda: bool(finished) or all(job.done() for job in jobs),
        do=follow,
        ready=lambda: all(job.done() for job in needed),
    )


def _jobs(stages: Stages, recovery: Recovery) -> list[Job]:
    data, result, part = stages.data, recovery.result, denoiser_name(stages.pipeline)
    pairs = data.training_pairs()
    if recovery.shares:
        if denoiser_in(stages.pipeline).config.get("pruning"):
            raise UserError(
                "fine_tune.shared_backbone=true needs a dense denoiser; this one is already pruned: set it to false"
            )
        return [Job(recovery, None, pairs, part, recovery.config, mixture_of(result, data, pairs))]
    if result.bins is not None:
        raise UserError("experts that depend on the timestep must share their weights: set shared_backbone: true")
    config, (_, pairs_of) = recovery.config, routed_pairs(result, data, pairs)
    if recovery.shares_steps and (trained := sum(map(bool, map(len, pairs_of)))):
        factor = len(pairs_of) / trained
        steps, warmup = int(config.steps * factor), round(config.warmup_steps * factor)
        config = config.model_copy(update={"steps": steps, "warmup_steps": warmup})
    return [Job(recovery, index, served, part, config) for index, served in enumerate(pairs_of)]


def _fine_tune(stages: Stages, job: Job, begins: Begins) -> None:
    """Recover one model and write its folder; an expert without prompts is not fine-tuned."""
    recovery, folder, processes = job.recovery, job.folder, current()
    dense, architectures = denoiser_in(stages.pipeline), recovery.result.architectures
    objective: Callable[..., FineTuningObjective] = FineTuningObjective
    objectives: list[BackboneObjective] = []
    if job.mixture is not None:
        objective = kept_objective(job.mixture, objectives)
    architecture = architectures[0].space.full() if job.index is None else architectures[job.index]
    begins(recovery.name, job.index or 0, False)
    student, figures = _refitted(stages, job, stages.held(slice_model(dense, architecture), job.trains_all))
    at_steps = stages.recipe.evaluation.at_steps

    def keep(name: str) -> None:
        if processes.is_main:
            _keep(student, recovery, job, name, objectives[0].members if objectives else ())

    begins(recovery.name, job.index or 0, True)
    if job.trains:
        milestones: dict[int, Callable[[], None]] = {
            step: partial(keep, f"step-{step}/{job.part}") for step in at_steps
        }
        figures |= fine_tune(
            student,
            dense,
            stages.data,
            job.config,
            folder / "checkpoints",
            scheduler=stages.pipeline.scheduler,
            pairs=job.pairs,
            seed=recovery.seed,
            title=job.title,
            log=stages.log,
            milestones=milestones,
            objective=objective,
            offload_teacher=stages.recipe.memory.offload,
        )
    else:
        for step in at_steps:
            keep(f"step-{step}/{job.part}")
    if processes.is_main:
        write_json(folder / FIGURES, figures)
        keep(job.part)
        Checkpoints(folder / "checkpoints").clear()
        shutil.rmtree(folder / REFITTED, ignore_errors=True)
    processes.wait()
    if recovery.fine_tunes:
        stages.say(f"{job.title}: fine-tuned on {len(job.pairs):,} captions")


def _refitted(stages: Stages, job: Job, student: ModelMixin) -> tuple[ModelMixin, dict[str, float]]:
    """Return the student after the recovery's closed-form refit, now or by an earlier start, and its first figures."""
    figures: dict[str, float] = {"steps": 0, "seconds": 0.0}
    config, processes, folder = job.recovery.closed_form, current(), job.folder / REFITTED
    if config is None:
        return student, figures
    if processes.agree((folder / job.part).is_dir()):
        student = stages.held(load_model(folder / job.part), job.trains_all)
    else:
        started = time.monotonic()
        title = f"{job.title}: refit"
        fits = refit(student, stages.pipeline, stages.data, config, job.recovery.seed, title=title)
        content = {"seconds": time.monotonic() - started, "layers": [asdict(fit) for fit in fits]}
        if processes.is_main:
            write_json(job.folder / REFIT, content)
            write_folder(folder / job.part, student.save_pretrained)  # not in the stock form, which renumbers blocks
        processes.wait()
        stages.say(f"{job.title}: {len(fits)} layers refitted on {config.samples:,} samples")
    content = read_json(job.folder / REFIT)
    return student, figures | {"refit_seconds": content["seconds"], "refit_layers": len(content["layers"])}


def _keep(student: ModelMixin, recovery: Recovery, job: Job, name: str, members: Sequence[Member]) -> None:
    """Write a model's folder; the experts' folders come before a backbone, so that an existing backbone is complete."""
    target = job.folder / name
    if job.index is None:
        for expert in range(recovery.result.num_experts):
            folder = recovery.folder / str(expert) / name
            count = len(recovery.result.members(expert))
            deltas = [member.deltas for member in members[expert * count : (expert + 1) * count]] or [None] * count
            write_folder(folder, partial(_save_members, student, recovery.result, expert, target, deltas))
    write_folder(target, lambda temporary: export_model(student, temporary))


def _save_members(
    backbone: ModelMixin,
    result: PruneResult,
    expert: int,
    weights: Path,
    deltas: Sequence[Deltas | None],
    folder: Path,
) -> None:
    """Write an expert's folder, which points to the backbone's weights and holds the expert's changes (deltas)."""
    if result.bins is not None:
        write_bins(folder, result.bins)
    for index, (architecture, changes) in enumerate(zip(result.members(expert), deltas, strict=True)):
        place = folder if result.bins is None else slice_folder(folder, index)
        save_member(backbone, architecture, place, backbone=weights)
        if changes is not None:
            changes.save(place)


def _recovered(stages: Stages, recovery: Recovery, jobs: Sequence[Job]) -> list[Candidate]:
    """Return the recovered models: a candidate per step whose weights were kept, then one for the last step."""
    result = recovery.result
    folders = [recovery.folder / str(index) for index in range(result.num_experts)]
    cost = CostModel(denoiser_in(stages.pipeline), result.space, stages.cost.sample_size, stages.cost.text_length)
    steps = stages.recipe.evaluation.steps
    macs = [result.expert_macs(cost, expert, stages.pipeline.scheduler, steps) for expert in range(result.num_experts)]
    params = [result.expert_params(cost, expert) for expert in range(result.num_experts)]
    member_macs = [cost.macs(architecture) for architecture in result.architectures]
    figures = [read_json(job.folder / FIGURES) for job in jobs]
    times = (float(trained["seconds"]) + trained.get("refit_seconds", 0.0) for trained in figures)
    seconds = result.info.search_seconds + sum(times)
    passes = float(recovery.dense_passes)
    for job, trained in zip(jobs, figures, strict=True):
        ratio = _mean_macs(job, member_macs, process_of(stages.pipeline)) / stages.cost.dense_macs
        passes += trained["steps"] * job.config.batch_size * job.config.dense_passes(ratio)
        if recovery.closed_form is not None:
            passes += recovery.closed_form.dense_passes(int(trained["refit_layers"]), ratio)
    at_steps = stages.recipe.evaluation.at_steps
    part_name = denoiser_name(stages.pipeline)
    rows: list[tuple[str, str, float | None, float | None]] = [
        (f"{recovery.name}@{step}", f"step-{step}/{part_name}", None, None) for step in at_steps
    ]
    return [
        Candidate(
            name, StoredModels([f / part for f in folders], stages.held), macs, params, result.router, spent, computed
        )
        for name, part, spent, computed in [*rows, (recovery.name, part_name, seconds, passes)]
    ]


def _mean_macs(job: Job, macs: Sequence[int], process: NoiseProcess) -> float:
    """Return the MACs of a job's model; for a backbone, the mean over its training pairs and their timesteps."""
    if job.mixture is None:
        assert job.index is not None
        return float(macs[job.index])
    bins, experts = job.mixture.bins, job.mixture.experts[job.pairs]
    shares = shares_of(experts, job.recovery.result.num_experts)
    if bins is not None:
        timesteps = shares_of(bins.of(torch.arange(process.num_timesteps)), len(bins))
        shares = torch.outer(shares, timesteps).flatten()
    return float(shares @ torch.tensor(macs, dtype=torch.float64))
