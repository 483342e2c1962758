"""`prunekit import aptp`: turn a release of APTP's authors into a run directory for `generate` and `export`.

    recipe.yaml                                model, prompt encoder, how to draw
    methods/aptp/result.json                   the architectures, and router.safetensors where there is a router
    methods/aptp/architectures/0.json …        each architecture in a file of its own
    methods/aptp/experts/0/unet/ …             each expert's UNet; only the config if no weights are available

The router is the paper's (Eq. 22), folded from the release's predictor and codes. The published code compares other
vectors: gates with noise that depends on a prompt's position in its batch. So it sends some prompts to other experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from prunekit.core.cost import CostModel
from prunekit.core.discovery import discover
from prunekit.core.slicing import slice_model
from prunekit.core.space import Architecture, UnitSpace
from prunekit.denoisers.unet.pruned import PrunedUNet2DConditionModel
from prunekit.export.importing.layout import architectures_of, published_structure, stated_structure
from prunekit.export.importing.release import Release, read_release, read_weights
from prunekit.export.model_folder import check_shapes
from prunekit.jobs.recipe import dump_recipe, parse_recipe
from prunekit.methods.result import PruneResult, ResultInfo, describe_cost
from prunekit.methods.router import Router
from prunekit.models import load_pipeline, load_shape
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import staged, write_json
from prunekit.runtime.run_directory import RECIPE

MODEL, PROMPT_ENCODER = "sd-2.1", "sentence-transformers/all-mpnet-base-v2"  # of the paper
ROUTING = "cosine of the predictor's output and the codes (Eq. 22), without the published code's noise"
PAPER = {  # how the paper fine-tunes and draws
    "fine_tune": {"steps": 30_000, "batch_size": 128, "learning_rate": 1e-5},
    "evaluation": {"steps": 25, "guidance": 7.5},
}


@dataclass(frozen=True)
class Imported:
    """An imported release.

    directory: directory of the run. result: its architectures and router. weights: source of each expert's weights.
    notes: facts that the user should know, one line each.
    """

    directory: Path
    result: PruneResult
    weights: list[str]
    notes: list[str]


def import_aptp(
    release: str | Path,
    directory: str | Path,
    model: str = MODEL,
    prompt_encoder: str = PROMPT_ENCODER,
) -> Imported:
    """Turn a release of the published implementation into a run directory; `release.py` describes the files read.

    Args:
        release: directory of the release, such as APTP-Base-COCO.
        directory: directory of the run, new or empty; it is written completely or not at all.
        model: dense model that was pruned, named as in a recipe.
        prompt_encoder: prompt encoder of the router, named as in a recipe.

    Raises:
        ValueError: no architecture vectors, vectors of another UNet, a pickle that holds more than tensors, or weights
            that do not fit their vector. The message is one line.

    """
    published, shape = read_release(Path(release)), load_shape(model)
    space = discover(shape.denoiser, "aptp")
    _check_fits(published, space, model)
    architectures = architectures_of(published.vectors, space)
    cost = CostModel(shape.denoiser, space, text_length=shape.text_length)
    result = PruneResult(architectures, _router(published, prompt_encoder), _info(published, architectures, cost))
    with staged(Path(directory)) as folder:
        method = folder / "methods" / "aptp"
        result.save(method)
        weights = []
        dense, notes = _dense(published, model)
        for index, architecture in enumerate(architectures):
            place = method / "experts" / str(index) / "unet"
            weights.append(_write_expert(architecture, published.weights[index], shape.denoiser, dense, place))
            write_json(method / "architectures" / f"{index}.json", architecture.to_dict())
        settings = {"name": Path(directory).name, "model": model, "prompt_encoder": prompt_encoder, **PAPER}
        methods = {"aptp": {"experts": len(architectures)} if len(architectures) > 1 else {}}
        mean = sum(result.info.ratio) / len(architectures)  # mean over experts; the prompts per expert are unknown
        prune = {"depth": "aptp", "budget": min(round(mean, 4), 0.9999)}
        recipe = parse_recipe({**settings, "prune": prune, "methods": methods})
        (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    return Imported(Path(directory), result, weights, [*published.notes, *notes])


def _check_fits(published: Release, space: UnitSpace, model: str) -> None:
    """Raise a one-line ValueError if the vectors belong to another UNet."""
    if published.vectors.shape[1] != space.size:
        raise UserError(
            f"the vectors have {published.vectors.shape[1]} values, but the UNet of {model} has {space.size} units "
            f"({space.num_width} width, {space.num_depth} depth); give the model that was pruned (--model)"
        )
    for path, structure in published.structures.items():
        if (stated := stated_structure(structure)) != (ours := published_structure(space)):
            pairs = enumerate(zip(stated[0], ours[0], strict=False))
            what = next((f"group {i} has {a} units there, {b} here" for i, (a, b) in pairs if a != b), None)
            what = what or f"{len(stated[0])} groups and {stated[1]} layers there, {len(ours[0])} and {ours[1]} here"
            raise UserError(f"{path} describes another UNet than that of {model}: {what}; give it by --model")


def _router(published: Release, prompt_encoder: str) -> Router | None:
    if published.predictor is None:
        return None
    predictor = published.predictor
    layer = torch.nn.Linear(predictor.weight.shape[1], len(predictor.weight), bias=predictor.bias is not None)
    layer.load_state_dict({"weight": predictor.weight} | ({} if predictor.bias is None else {"bias": predictor.bias}))
    return Router.from_codes(layer, predictor.codes, info={"prompt_encoder": prompt_encoder, "routing": ROUTING})


def _info(published: Release, architectures: list[Architecture], cost: CostModel) -> ResultInfo:
    """Return the known facts of a release; the settings of its search are unknown."""
    info = describe_cost(architectures, cost)
    info.method = "aptp"
    info.imported = {"experts": len(architectures), "has_router": published.predictor is not None}
    return info


def _dense(published: Release, model: str) -> tuple[UNet2DConditionModel | None, list[str]]:
    """Return the dense UNet to cut experts without weights from (None: not needed or not available), and notes."""
    missing = [index for index, path in enumerate(published.weights) if path is None]
    if not missing:
        return None, []
    who = "no expert has" if len(missing) == len(published.weights) else f"experts {missing} have no"
    try:
        dense = load_pipeline(model).unet
    except ValueError as error:
        return None, [f"{who} weights, and the model is not on this machine, so only configs were written ({error})"]
    return dense, [f"{who} fine-tuned weights; their weights are cut from {model} and not fine-tuned"]


def _write_expert(
    architecture: Architecture,
    weights: Path | None,
    blank: UNet2DConditionModel,
    dense: UNet2DConditionModel | None,
    folder: Path,
) -> str:
    """Write an expert's UNet; return the source of its weights."""
    if weights is None and dense is not None:
        slice_model(dense, architecture).save_pretrained(folder)
        return "cut from the model"
    pruned: PrunedUNet2DConditionModel = slice_model(blank, architecture)
    if weights is None:
        pruned.save_config(folder)
        return "none"
    state = read_weights(weights)
    check_shapes(weights.parent, pruned, {name: tuple(value.shape) for name, value in state.items()})
    pruned.load_state_dict(state, assign=True)
    pruned.save_pretrained(folder)
    return "the release"
