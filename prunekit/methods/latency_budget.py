"""A budget in time instead of MACs: the latency table of the denoiser on a device, measured once and kept as JSON."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from prunekit.core.cost import CostModel
from prunekit.core.slicing import slice_model
from prunekit.core.space import Architecture
from prunekit.data.fingerprint import Fingerprint
from prunekit.measuring.clock import timed_call, timed_inputs
from prunekit.measuring.interleaved import WarmUp, measure
from prunekit.measuring.latency_model import LatencyModel
from prunekit.measuring.latency_table import DEFAULT_WIDTHS, LatencyTable, conditions_of
from prunekit.measuring.layer_times import check_timed, measure_table
from prunekit.methods.budget import unit_step
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_json
from prunekit.runtime.processes import current
from prunekit.runtime.progress import Progress

HERE = "here"
ANYWHERE = ("model", "sample_size", "text_length")  # conditions that a table from another machine must match
PAIRS = 9  # interleaved samples of an architecture and the dense model


class LatencySettings(BaseModel):
    """Device and conditions of a budget of time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = Field(
        HERE,
        description="Device to measure: here (the device of the model), or the file of a table that was measured on "
        "another machine.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Dtype used for timing.")
    batch: int = Field(2, ge=1, description="Samples of a call; guidance doubles it.")
    tables: str = Field("~/.cache/prunekit/latency", description="Directory of the tables.")


def latency_model(
    model: ModelMixin, cost: CostModel, settings: LatencySettings, align: int | None = None
) -> LatencyModel:
    """Return the cost model in time; if the folder has no table for these conditions, measure one and save it.

    Raises:
        ValueError: a model on the meta device, or one that cannot be timed layer by layer; a file that is not a table,
            or one of another model, size or text length.

    """
    check_timed(model)
    path, conditions = Path(settings.device).expanduser(), _conditions(model, cost, settings)
    if settings.device == HERE:
        path = Path(settings.tables).expanduser() / f"{Fingerprint(*sorted(conditions.items())).key()[:16]}.json"
        current().first(partial(_measure_into, path, model, cost, settings))
    elif not path.is_file():
        raise UserError(f"latency device {settings.device!r}: give {HERE!r}, or the file of a latency table")
    table = LatencyTable.from_dict(read_json(path))
    table.refuse(conditions if settings.device == HERE else {name: conditions[name] for name in ANYWHERE})
    return LatencyModel(model, cost, table, lambda group: unit_step(group, align))


def predicted_and_measured(
    model: ModelMixin, architectures: list[Architecture], cost: LatencyModel, settings: LatencySettings
) -> list[dict[str, Any]]:
    """Time architectures beside the dense model, under the table's conditions; return a row of JSON values for each.

    macs_ratio, predicted, measured: fractions of the dense model's MACs or time. error: relative error of the
    prediction. noise: distance from 1 of the dense model's time over itself. With a table from another machine nothing
    is measured, and a row has no `measured`, `error` and `noise`.
    """
    rows = []
    for index, architecture in enumerate(architectures):
        row = {"expert": index, "macs_ratio": cost.ratio(architecture), "predicted": cost.latency_ratio(architecture)}
        if settings.device == HERE:
            row |= _against(model, architecture, cost, settings, row["predicted"])
        rows.append(row)
    return rows


@torch.no_grad()
def _against(
    model: ModelMixin,
    architecture: Architecture,
    cost: LatencyModel,
    settings: LatencySettings,
    predicted: float,
) -> dict[str, float]:
    dtype = getattr(torch, settings.dtype)
    models = [nn.Module.to(slice_model(model, kept), dtype).eval() for kept in (cost.space.full(), architecture)]
    call = timed_inputs(models[0], settings.batch, cost.sample_size, cost.text_length)
    calls = {name: timed_call(timed, call) for name, timed in zip(("dense", "pruned"), models, strict=True)}
    measured = measure(calls, PAIRS, model.device, WarmUp(max_seconds=10.0))
    ratio = measured.ratio("pruned").value
    return {"measured": ratio, "error": predicted / ratio - 1, "noise": measured.noise.distance}


def _conditions(model: ModelMixin, cost: CostModel, settings: LatencySettings) -> dict[str, Any]:
    dtype = getattr(torch, settings.dtype)
    return conditions_of(model, cost.sample_size, cost.text_length, settings.batch, dtype)


def _measure_into(path: Path, model: ModelMixin, cost: CostModel, settings: LatencySettings) -> None:
    if not path.is_file():
        write_json(path, _measured(model, cost, settings).to_dict())


def _measured(model: ModelMixin, cost: CostModel, settings: LatencySettings) -> LatencyTable:
    with Progress("latency table", DEFAULT_WIDTHS + 1) as bar:
        return measure_table(
            model,
            cost.sample_size,
            cost.text_length,
            batch=settings.batch,
            dtype=getattr(torch, settings.dtype),
            widths=DEFAULT_WIDTHS,
            progress=bar.update,
        )
