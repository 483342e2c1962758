"""The model card of an export, written from the records of its run; and the upload to the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from prunekit.models.names import DENOISERS, KNOWN
from prunekit.runtime.errors import UserError, first_line, markdown_text
from prunekit.runtime.run_directory import DENSE

CARD = "README.md"
HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
COLUMNS = ("macs_ratio", "params", "clip_score", "frechet", "kid", "cmmd")  # columns of the run's table to show
_STOCK = """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(MODEL)
```"""
_CLASS = """Without prunekit, the {noun}'s class comes from `{part}/modeling_pruned.py` here; read it first:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(MODEL, trust_remote_code=True)
```

With prunekit, no code of this repository runs:

```python
from prunekit.export import load_pipeline_directory

pipeline = load_pipeline_directory(DIRECTORY)
```"""
_OWN = """```python
from prunekit import PromptRoutedPipeline

pipeline = PromptRoutedPipeline.from_pretrained(DIRECTORY)
output = pipeline(["a red apple", "a city at night"], seeds=0, batch_size=4)
output.images, output.experts
```"""
_ROUTED = f"""{_OWN}

Without prunekit, by diffusers and sentence-transformers. The classes come from `pipeline.py`, `experts/mixture.py` and
`experts/*/modeling_pruned.py` here; read them first:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(DIRECTORY, custom_pipeline="pipeline", trust_remote_code=True)
output = pipeline("a red apple", num_inference_steps=25)
output.images, output.experts
expert = pipeline.stock_pipeline(0)  # a stock pipeline with one expert
```"""
_SLICED = f"""{_OWN}

Each expert consists of slices, one for each bin of timesteps. Only prunekit chooses among them."""
_DENOISER = """```python
from diffusers import AutoModel

{part} = AutoModel.from_pretrained(MODEL, trust_remote_code=True)  # of a stock {noun}: without
```"""
_GRAPH = "`model.onnx` runs in onnxruntime, `model.pt2` by `torch.export.load`; `specification.json` lists the inputs."
_SINGLE_FILE = """`model.safetensors` has the names and layout in which models of this class were published. In
diffusers, with the class that `config.json` names as CLASS:

```python
{part} = CLASS.from_single_file(DIRECTORY + "/model.safetensors", config=DIRECTORY)
```"""
USES = {
    "stock": _STOCK,
    "class": _CLASS,
    "routed": _ROUTED,
    "sliced": _SLICED,
    "denoiser": _DENOISER,
    "single-file": _SINGLE_FILE,
    "graph": _GRAPH,
}


def model_card(
    use: str,
    name: str,
    info: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    checked: Sequence[Mapping[str, Any]],
    table: Sequence[Mapping[str, Any]] = (),
    part: str = "unet",
    notes: Sequence[str] = (),
) -> str:
    """Return the card's text.

    Names and figures may come from files that others wrote, so Markdown in anything but numbers is escaped.

    Args:
        use: how the export is loaded, a key of USES.
        name: title of the card.
        info: model, method, recipe and result of the mixture; missing entries are left out.
        rows: one row per denoiser: tier, macs, params.
        checked: records that `verify` returned.
        table: named rows of the run's results; the rows of the method and of the dense model are shown.
        part: the name of the pipeline's denoiser: "unet" or "transformer".
        notes: paragraphs below the table of the denoisers.

    """
    noun = DENOISERS[part]
    result, base = _mapping(info.get("result")), _hub_id(info.get("model"))
    head = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["prunekit", "pruned"]}
    head |= {"base_model": base} if base else {}
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {markdown_text(name)}"]
    parts += [_summary(info, result, base, noun, len(rows))]
    parts += [_markdown((noun, "tier", "MACs", "parameters"), [(i, *_numbers(row)) for i, row in enumerate(rows)])]
    parts += notes
    shown = [row for row in table if row.get("name") in (DENSE, info.get("method"))]
    if shown:
        columns = [column for column in COLUMNS if any(row.get(column) is not None for row in shown)]
        body = [(row["name"], *(_figure(row.get(column)) for column in columns)) for row in shown]
        parts += ["## Figures of the run", _markdown(("model", *columns), body)]
    parts += [
        "## Use",
        USES[use].format(noun=noun, part=part),
        "## Checked",
        "Each in a fresh process, against the model in memory:",
    ]
    parts += [
        "\n".join(
            f"- {line['what']}, opened by {line['opened_by']}: relative error {line['relative_error']:.1e} "
            f"(allowed {line['tolerance']:.0e})"
            for line in checked
        )
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(info: Mapping[str, Any], result: Mapping[str, Any], base: str | None, noun: str, count: int) -> str:
    method, settings = info.get("method"), _mapping(result.get("settings"))
    origin = f", {markdown_text(base)}" if base else ""
    words = [f"A text-to-image diffusion model{origin}, whose {noun} was cut by prunekit {version('prunekit')}"]
    words[-1] += (f" with {markdown_text(str(method))}" if method else "") + "."
    if count > 1:
        words.append(f"A router sends each prompt to one of {count} experts.")
    if "budget" in settings:
        what = "time" if settings.get("latency") else "MACs"
        words.append(f"Budget: {markdown_text(_figure(settings['budget']))} of the dense {what}.")
    if "dense_macs" in result:
        macs, params = (markdown_text(_figure(result.get(name))) for name in ("dense_macs", "dense_params"))
        words.append(f"The dense {noun} takes {macs} MACs and {params} parameters.")
    if info.get("recipe"):
        words.append(f"Recipe: {markdown_text(str(info['recipe']))}.")
    return " ".join(words)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _hub_id(model: Any) -> str | None:
    """Return the hub id of a recipe's model; None for a directory, a file or the embedded model."""
    if not isinstance(model, str):
        return None
    if model in KNOWN:
        return KNOWN[model]
    return model if HUB_ID.fullmatch(model) and not Path(model).exists() else None


def _numbers(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["tier"], f"{row['macs']:,}", f"{row['params']:,}"


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([markdown_text(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def push_to_hub(directory: str | Path, repository: str, private: bool = False) -> str:
    """Upload an exported directory to a model repository, which is created if missing; return its address.

    Raises:
        UserError: the hub cannot be reached, or refuses the upload.

    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    hub = HfApi()
    try:
        address = hub.create_repo(repository, exist_ok=True, private=private)
        hub.upload_folder(repo_id=repository, folder_path=str(directory), commit_message="Export of prunekit")
    except (OSError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{directory} is exported, but cannot be pushed to {repository}: {first_line(error)}; log in with "
            "`hf auth login`, and check the name"
        ) from error
    return str(address)
