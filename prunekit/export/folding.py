"""Folding a transformer's modulation layers, so that they read a short code instead of a wide vector.

In Qwen-Image, FLUX.1 and SD 3.5, these layers hold a third of the parameters and do almost no compute. The vectors that
the layers read are recorded in calls of the model's own pipeline, at the timesteps of its sampler. Where the vectors
depend on the timestep alone, a table of the sampler's steps is exact. Elsewhere, a few directions of the vectors are
kept, and the error is measured on held-out vectors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.core.discovery import discover
from prunekit.core.modulation import FORMAT, Modulation, fold
from prunekit.core.registry import call_options, denoiser_in, denoiser_of
from prunekit.core.slicing import slice_model
from prunekit.core.timesteps import TimestepModel
from prunekit.export.inputs import relative_error
from prunekit.export.lora_slicing import DOWN, LAYER, layer_of
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_json
from prunekit.runtime.tensors import save_tensors

REPORT, BASIS = "folding.json", "folding.safetensors"  # beside the weights of a folded model
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PLAN = re.compile(r"(table|nearest|rank)=(\d+)(?:@(\d+)x(\d+))?")
STEPS, HELD_OUT_STEPS = 28, 20  # sampler steps of the calls that a rank is computed from, and measured on
GUIDANCES, HELD_OUT_GUIDANCES = (1.0, 3.5, 7.0), (2.5, 5.0)  # guidance scales of these calls, if guidance is an input
SMALLEST = 1e-8  # lower bound of eigenvalues, relative to the largest
CALLS = 4  # number of calls in which outputs are compared


@dataclass(frozen=True)
class Recorded:
    """The vectors that a model's modulation layers read in calls of its pipeline.

    timesteps: (n,) timesteps of the noise process. inputs: (n, d) float64, the embeddings after SiLU.
    """

    timesteps: list[float]
    inputs: Tensor


@dataclass(frozen=True)
class Folded:
    """A folded model.

    model: model of the pruned class; the `folding` in its config says how it is folded.
    basis: (k, d) float32, the basis of the codes' coordinates; `project_lora` needs it.
    report: parameters and bytes before and after, and measured errors.
    """

    model: Any
    basis: Tensor
    report: dict[str, Any]

    @property
    def summary(self) -> str:
        """The kind of folding, the parameters before and after, and the error of the outputs, in words."""
        report = self.report
        before, after, error = report["before"], report["after"], report["output_error"]
        how = f"{report['rank']} directions of what they read, and its mean"
        if report["kind"] == "table":
            steps = self.model.config["folding"]["timesteps"]
            other = "taken for the nearest" if report["nearest"] else "refused"
            how = f"a table of {len(steps)} timesteps ({steps[0]:g} … {steps[-1]:g}); others are {other}"
        return (
            f"The {report['layers']} modulation layers are folded to {how}. Parameters: {before['parameters']:,} "
            f"before, {after['parameters']:,} after; bytes: {before['bytes']:,} before, {after['bytes']:,} after. "
            f"Outputs differ by {error['mean']:.1e} (relative, mean of {error['calls']} calls; largest "
            f"{error['max']:.1e}). `{REPORT}` has the details."
        )

    def save(self, folder: Path) -> None:
        """Write the report and the basis beside the model's weights."""
        write_json(folder / REPORT, self.report)
        save_tensors(folder / BASIS, {"basis": self.basis})


@dataclass(frozen=True)
class FoldingPlan:
    """How an export folds modulation layers.

    kind: "table", "nearest" (a table that rounds other timesteps to its nearest step) or "rank".
    size: number of steps in the table, or the rank.
    options: arguments of the pipeline's calls: height and width in pixels, if the plan states them.
    """

    kind: str
    size: int
    options: Mapping[str, int]

    @classmethod
    def parse(cls, text: str) -> FoldingPlan:
        """Read "table=N", "nearest=N" or "rank=R", each with "@WIDTHxHEIGHT" for a size other than the pipeline's."""
        match = PLAN.fullmatch(text)
        if match is None or int(match[2]) < 1:
            raise UserError(
                f"fold_modulation={text!r}: give table=N (the sampler's N steps, exact), nearest=N (as table, other "
                "timesteps are rounded to these) or rank=R; @WIDTHxHEIGHT behind it where pictures are not of the "
                "pipeline's size"
            )
        size = {} if match[3] is None else {"width": int(match[3]), "height": int(match[4])}
        return cls(match[1], int(match[2]), size)

    def fold(self, pipeline: Any, guidance: float, prompts: Sequence[str], held_out: Sequence[str]) -> Folded:
        """Fold a pipeline's denoiser, and measure the error of its outputs.

        Args:
            pipeline: a stock pipeline.
            guidance: scale of the guidance.
            prompts: prompts whose vectors are recorded; for a table, only the first one.
            held_out: prompts on which the error is measured.

        """
        model = denoiser_in(pipeline)
        with_input = bool(model.config.get("guidance_embeds"))

        def recorded(texts: Sequence[str], steps: int, scales: Sequence[float]) -> Recorded:
            scales = sorted({*scales, guidance}) if with_input else [guidance]
            options = {**self.options, "num_inference_steps": steps}
            records = [record_modulation(pipeline, texts, scale, **options) for scale in scales]
            return Recorded([t for r in records for t in r.timesteps], torch.cat([r.inputs for r in records]))

        if self.kind == "rank":
            seen, unseen = (
                recorded(prompts, STEPS, GUIDANCES),
                recorded(held_out, HELD_OUT_STEPS, HELD_OUT_GUIDANCES),
            )
            folded = fold_modulation(model, seen, self.size, held_out=unseen)
        else:
            folded = fold_modulation(model, recorded(prompts[:1], self.size, ()), nearest=self.kind == "nearest")
        steps = CALLS if self.kind == "rank" else self.size
        options = {**self.options, "num_inference_steps": steps}
        errors = output_errors(pipeline, {"": folded.model}, held_out[:1], guidance, calls=CALLS, **options)
        folded.report["output_error"] = errors[""]
        return folded


class _StopError(Exception):
    """Ends a forward pass once the embedding is known."""


def modulation_of(model: Any) -> Modulation:
    """Return where a model's modulation layers lie; raise UserError if they cannot be folded or already are."""
    _refuse_slices(model)
    modulation = denoiser_of(model).modulation
    if modulation is None:
        raise UserError(f"a {type(model).__name__} has no modulation layers that can be folded")
    if model.config.get("folding") is not None:
        raise UserError("this model's modulation layers are folded already")
    return modulation


def _refuse_slices(model: Any) -> None:
    """Raise UserError for a `TimestepModel`, whose slices are folded one by one."""
    if isinstance(model, TimestepModel):
        raise UserError("a TimestepModel has a slice for each bin of timesteps: give one of its `slices`")


def record_modulation(
    pipeline: Any, prompts: Sequence[str] | None, guidance: float, batch: int = 8, **options: Any
) -> Recorded:
    """Run a pipeline without its denoiser's blocks, and record the inputs of the modulation layers.

    Args:
        pipeline: a stock pipeline.
        prompts: texts; None where `options` holds their embeddings.
        guidance: guidance scale, passed by the pipeline's name for it.
        batch: number of prompts per call.
        options: further arguments of the pipeline's call, such as num_inference_steps, height and width.

    """
    model = denoiser_in(pipeline)
    modulation = modulation_of(model)
    timesteps: list[float] = []
    inputs: list[Tensor] = []

    def stop(module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        given = arguments[0].flatten().double() * modulation.unit
        timesteps.extend(given.expand(len(output)).tolist())
        inputs.append(F.silu(output.float()).double().cpu())
        raise _StopError

    def without_blocks(forward: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Tensor]:
        with suppress(_StopError):
            forward(*arguments, **named)
        return (torch.zeros_like(arguments[0] if arguments else named[denoiser_of(model).latent]),)

    handle = model.get_submodule(modulation.embedding).register_forward_hook(stop)
    try:
        with _instead(model, without_blocks):
            _run(pipeline, prompts, guidance, batch, options)
    finally:
        handle.remove()
    return Recorded(timesteps, torch.cat(inputs))


def fold_modulation(
    model: Any, recorded: Recorded, rank: int | None = None, nearest: bool = False, held_out: Recorded | None = None
) -> Folded:
    """Return a copy of a model whose modulation layers are folded.

    Args:
        model: a dense or pruned transformer.
        recorded: the vectors that its modulation layers read; for a table, in one run of the sampler.
        rank: number of directions to keep; None: a table of the recorded timesteps, exact at them.
        nearest: for a table: whether another timestep is rounded to the nearest one, instead of refused.
        held_out: a record with other prompts and another number of sampler steps, to measure a rank's error.

    Raises:
        UserError: a model without such layers, or a table for layers that do not depend on the timestep alone.

    """
    modulation = modulation_of(model)
    folding: dict[str, Any] = {"format": FORMAT, "kind": "table"}
    if rank is None:
        if not modulation.of_timestep_alone:
            raise UserError(
                f"a table of modulations is for models where only the timestep enters them; in {_stock_name(model)} "
                "the pooled text does too: give rank=R"
            )
        first = {timestep: index for index, timestep in reversed(list(enumerate(recorded.timesteps)))}
        basis = recorded.inputs[list(reversed(first.values()))]  # (N, d)
        folding |= {"timesteps": list(reversed(first)), "nearest": nearest}
    else:
        directions = Directions.of(modulation.linears(model).values(), recorded.inputs, rank)
        basis = torch.cat([directions.basis, directions.mean[None]])  # (rank + 1, d)
        folding |= {"kind": "rank", "rank": rank}
    weights = {path: linear.weight.detach() for path, linear in modulation.linears(model).items()}
    report = {"kind": folding["kind"], "before": _sizes(model), "modulation_before": sum(map(_numel, weights.values()))}
    folded = slice_model(model, discover(model, "none").full())
    fold(modulation, folded, folding)
    folded.register_to_config(folding=folding)
    with torch.no_grad():
        for path, linear in modulation.linears(folded).items():
            linear.weight.copy_(weights[path].double() @ basis.T.to(weights[path].device))
            linear.weight.requires_grad_(model.get_submodule(path).weight.requires_grad)
        if rank is not None:
            code = folded.get_submodule(modulation.embedding).code
            code.weight.copy_(directions.code)
            code.bias.copy_(-directions.code @ directions.mean)
            code.requires_grad_(False)
    report |= {
        "after": _sizes(folded),
        "modulation_after": sum(_numel(linear.weight) for linear in modulation.linears(folded).values()),
        "layers": len(weights),
        "recorded": len(recorded.timesteps),
    }
    if rank is None:
        report |= {"steps": len(basis), "nearest": nearest}
    else:
        report |= {"rank": rank}
        if held_out is not None:
            ranks = [*(r for r in RANKS if r < min(recorded.inputs.shape)), rank]
            report["errors"] = errors_by_rank(model, recorded, held_out, sorted(set(ranks)))
            report["held_out"] = len(held_out.timesteps)
    return Folded(folded.train(model.training), basis.float(), report)


@dataclass(frozen=True)
class Directions:
    """A linear code of vectors u: c = code·(u - mean), which is decoded as u ≈ basisᵀ·c + mean.

    code, basis: (r, d). mean: (d,). The first r' rows are the best code of length r'.
    """

    code: Tensor
    basis: Tensor
    mean: Tensor

    @classmethod
    def of(cls, linears: Iterable[nn.Linear], inputs: Tensor, rank: int) -> Directions:
        """Return the directions with the smallest squared error of the layers' outputs, over all layers and vectors.

        No other linear code of the centered vectors with length `rank` has a smaller error (Eckart and Young, 1936).
        The directions are the principal ones of G^½·(u - mean), where G is the sum of WᵀW over the layers.

        Args:
            linears: the layers.
            inputs: (n, d), the vectors that the layers read.
            rank: number of directions r.

        Raises:
            UserError: a rank below 1, or above n - 1 or d.

        """
        most = min(len(inputs) - 1, inputs.shape[1])
        if not 1 <= rank <= most:
            raise UserError(
                f"rank={rank}: must be between 1 and {most}, for {len(inputs)} vectors of {inputs.shape[1]}"
            )
        gram = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
        for linear in linears:
            weight = linear.weight.detach().double()
            gram += (weight.T @ weight).cpu()
        values, vectors = torch.linalg.eigh(gram)
        roots = values.clamp_min(SMALLEST * values[-1]).sqrt()
        mean = inputs.mean(dim=0)
        first = torch.linalg.svd((inputs - mean) @ (vectors * roots) @ vectors.T, full_matrices=False)[2][:rank]
        return cls(first @ (vectors * roots) @ vectors.T, first @ (vectors / roots) @ vectors.T, mean)


def errors_by_rank(
    model: Any,
    recorded: Recorded,
    held_out: Recorded,
    ranks: Sequence[int],
    kept_for: Sequence[nn.Linear] | None = None,
) -> list[dict[str, float | int]]:
    """Return, for each rank, the relative L2 error of the modulation layers' outputs on held-out vectors.

    Each rank has one row: `error` over all layers together, `worst_layer` with the largest error of one layer, and
    `parameters` of the folded layers and the code.

    kept_for: layers whose output error the directions minimize; by default, the model's modulation layers.
    """
    linears = modulation_of(model).linears(model).values()
    directions = Directions.of(kept_for or linears, recorded.inputs, max(ranks))
    shifted = held_out.inputs - directions.mean
    rests = [shifted - (shifted @ directions.code[:rank].T) @ directions.basis[:rank] for rank in ranks]
    squares = torch.zeros(len(ranks), len(linears), dtype=torch.float64)
    whole = torch.zeros(len(linears), dtype=torch.float64)
    for column, linear in enumerate(linears):
        weight = linear.weight.detach().double()
        bias = None if linear.bias is None else linear.bias.detach().double()
        whole[column] = F.linear(held_out.inputs.to(weight), weight, bias).square().sum()
        for row, rest in enumerate(rests):
            squares[row, column] = (rest.to(weight) @ weight.T).square().sum()
    outputs, width = sum(linear.out_features for linear in linears), len(directions.mean)
    return [
        {
            "rank": rank,
            "error": float((squares[row].sum() / whole.sum()).sqrt()),
            "worst_layer": float((squares[row] / whole).max().sqrt()),
            "parameters": outputs * (rank + 1) + (width + 1) * rank,
        }
        for row, rank in enumerate(ranks)
    ]


def output_errors(
    pipeline: Any,
    folded: Mapping[str, Any],
    prompts: Sequence[str] | None,
    guidance: float,
    calls: int | None = None,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Return the errors of folded models' outputs, relative to the pipeline's denoiser, in its sampler's calls.

    Every folded model gets the arguments of the denoiser's calls. The result has for each model, by name, the mean and
    the largest relative L2 error of the calls, and the number of calls, at most `calls`. The other arguments are those
    of `record_modulation`.
    """
    errors: dict[str, list[float]] = {name: [] for name in folded}

    def compared(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if calls is not None and any(len(rows) == calls for rows in errors.values()):
            raise _StopError
        output = forward(*arguments, **named)
        for name, other in folded.items():
            errors[name].append(relative_error(other(*arguments, **named)[0], output[0]))
        return output

    with _instead(denoiser_in(pipeline), compared), suppress(_StopError):
        _run(pipeline, prompts, guidance, 8, options)
    return {
        name: {"mean": sum(rows) / len(rows), "max": max(rows), "calls": len(rows)} for name, rows in errors.items()
    }


def project_lora(
    state: Mapping[str, Tensor], model: Any, basis: Tensor | str | Path, prefix: str = "transformer."
) -> dict[str, Tensor]:
    """Return a model's LoRA weights for its folded form: on folded layers, A (r, d) becomes A·Eᵀ (r, k).

    The folded layer then computes (W + B·A)·Eᵀ·c, so the LoRA is as exact as the folding.

    Args:
        state: LoRA weights by name, as the pipeline's `lora_state_dict` returns them.
        model: the folded model.
        basis: E (k, d), or the folder that a folded model was exported to.
        prefix: prefix of the weights' names.

    Raises:
        UserError: the model is not folded; the LoRA changes the embedding, so the basis would be wrong; or a weight
            does not fit.

    """
    _refuse_slices(model)
    modulation, folding = denoiser_of(model).modulation, model.config.get("folding")
    if modulation is None or folding is None:
        raise UserError("this model is not folded: load the LoRA as it is")
    vectors = basis if isinstance(basis, Tensor) else read_basis(basis)
    linears = modulation.linears(model)
    projected = {}
    for name, value in state.items():
        path = layer_of(name).removeprefix(prefix)
        if path.startswith(f"{modulation.embedding}."):
            raise UserError(
                f"{name} changes the embedding that this model's modulation layers were folded for: merge the LoRA "
                "into the model before folding it"
            )
        match = LAYER.fullmatch(name)
        if path in linears and match is not None and match["side"] in DOWN:
            if value.shape[1] != vectors.shape[1]:
                raise UserError(f"{name} is {tuple(value.shape)}, not (r, {vectors.shape[1]}): it is another model's")
            value = (value.double() @ vectors.T.to(value.device).double()).to(value.dtype)
        projected[name] = value
    return projected


def read_basis(folder: str | Path) -> Tensor:
    """Return the basis (k, d) in the folder of a folded model; raise UserError if there is none."""
    from safetensors.torch import load_file

    path = Path(folder) / BASIS
    if not path.is_file():
        raise UserError(f"{folder} holds no {BASIS}: it is not the folder of a folded model")
    return load_file(path)["basis"]


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a folded model's folder."""
    return read_json(folder / REPORT)


def _run(pipeline: Any, prompts: Sequence[str] | None, guidance: float, batch: int, options: dict[str, Any]) -> None:
    """Run the pipeline on all prompts, up to the final latents."""
    pipeline.set_progress_bar_config(disable=True)
    given = {**call_options(pipeline, guidance), "output_type": "latent", **options}
    batches = [None] if prompts is None else [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    for texts in batches:
        with torch.no_grad():
            pipeline(**({} if texts is None else {"prompt": list(texts)}), **given)


@contextmanager
def _instead(model: Any, called: Callable[..., Any]) -> Iterator[None]:
    """Call `called(forward, ...)` in place of a model's forward."""
    forward = model.forward
    model.forward = lambda *arguments, **named: called(forward, *arguments, **named)
    try:
        yield
    finally:
        del model.forward


def _stock_name(model: Any) -> str:
    return type(model).__name__.removeprefix("Pruned")


def _numel(tensor: Tensor) -> int:
    return tensor.numel()


def _sizes(model: Any) -> dict[str, int]:
    """Return the number of a model's parameters and of their bytes."""
    return {
        "parameters": sum(map(_numel, model.parameters())),
        "bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }
