"""Verifying an export: open it in a fresh process and compare its output with the model's in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunekit.core.registry import latent_size
from prunekit.export import fresh
from prunekit.export.inputs import Called, Inputs, example_inputs, relative_error
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import full_disk_named

TOLERANCE = {"onnx": 1e-3}  # allowed relative L2 error, by form; of all other forms:
DEFAULT_TOLERANCE = 1e-5
FORMS = {  # by tier: each form in which a user opens it, and whether prunekit may be imported
    "stock": (("stock", False), ("prunekit", True)),
    "class": (("class", False), ("prunekit", True)),
    "single-file": (("single-file", False),),
    "onnx": (("onnx", False),),
    "torch": (("torch", False),),
}
SAID = {
    "stock": "the stock class without prunekit",
    "single-file": "the stock class's from_single_file without prunekit",
    "class": "AutoModel with the class file, without prunekit",
    "pipeline": "DiffusionPipeline without prunekit",
    "routed": "PromptRoutedPipeline of prunekit: the expert of each of 17 prompts",
    "mixture": "DiffusionPipeline without prunekit: the expert of each of 17 prompts",
    "prunekit": "prunekit's own class",
    "onnx": "onnxruntime",
    "torch": "torch.export.load without prunekit",
}
SECONDS = 1800  # time limit of the fresh process


@dataclass(frozen=True)
class Expected:
    """The outputs that an export must return, computed in memory: (inputs, output) for each batch."""

    pairs: list[tuple[Inputs, Tensor]]

    @classmethod
    def of(cls, model: ModelMixin, text_length: int, batches: Sequence[int] = (2,)) -> Expected:
        """Run a denoiser in float32 on the CPU, at its own latent size, once for each of the batch sizes `batches`."""
        if (model.device.type, model.dtype) != ("cpu", torch.float32):
            model = model.to("cpu", torch.float32)
        pairs = []
        for batch in batches:
            inputs = example_inputs(model, batch, latent_size(model), text_length)
            with torch.no_grad():
                pairs.append((inputs, Called(model, inputs).eval()(**inputs.tensors)))
        return cls(pairs)


@dataclass(frozen=True)
class Claim:
    """An export, opened in one form, that must return the expected outputs.

    form: form in which the export is opened. what: name of the export in reports. folder: folder of the export.
    with_prunekit: whether prunekit may be imported.
    """

    form: str
    what: str
    folder: Path
    expected: Expected
    with_prunekit: bool


def claims_of(tier: str, folder: Path, what: str, expected: Expected) -> list[Claim]:
    """Return the claims of a denoiser's folder of a tier: one for each way to open it."""
    return [Claim(form, what, folder, expected, with_prunekit) for form, with_prunekit in FORMS[tier]]


def verify(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Open each export in a fresh process, and compare its outputs with the expected ones.

    Claims without prunekit are checked first, while prunekit cannot be imported. Returns a record of each check.

    Raises:
        UserError: an export does not open, its output has a relative L2 error above 1e-5 (ONNX: 1e-3), or the fresh
            process takes more than 1,800 s.

    """
    with tempfile.TemporaryDirectory(prefix="prunekit-") as name, full_disk_named(Path(name)):
        scratch = Path(name)
        jobs: list[dict[str, Any]] = []
        for index, claim in enumerate(claims):
            files = []
            for batch, (inputs, _) in enumerate(claim.expected.pairs):
                stem = scratch / f"{index}-{batch}"
                save_file(inputs.tensors, f"{stem}.in.safetensors")
                paths = {"in": f"{stem}.in.safetensors", "out": f"{stem}.out.safetensors"}
                files.append({**paths, "nested": inputs.nested, "plain": inputs.plain})
            target = {"form": claim.form, "folder": str(claim.folder), "prunekit": claim.with_prunekit}
            jobs.append({**target, "files": files})
        (scratch / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        _run(scratch / "jobs.json", scratch)
        return [
            _checked(claim, [file["out"] for file in job["files"]]) for claim, job in zip(claims, jobs, strict=True)
        ]


def _checked(claim: Claim, outputs: Sequence[str]) -> dict[str, Any]:
    """Return the record of a check; raise UserError if the outputs differ too much from the expected ones."""
    pairs = zip(outputs, claim.expected.pairs, strict=True)
    error = max(relative_error(load_file(output)["out"], expected) for output, (_, expected) in pairs)
    tolerance = TOLERANCE.get(claim.form, DEFAULT_TOLERANCE)
    if not error <= tolerance:
        raise UserError(
            f"the export's {claim.what}, opened by {SAID[claim.form]}, differs from the model in memory by "
            f"{error:.1e} (allowed: {tolerance:.0e}); nothing was written. Please report this"
        )
    subject = {"what": claim.what, "opened_by": SAID[claim.form]}
    return {**subject, "relative_error": error, "tolerance": tolerance}


def _run(jobs: Path, scratch: Path) -> None:
    """Run the fresh process, isolated from this process's paths, offline, with a separate module cache."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    environment |= {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    command = [sys.executable, "-I", str(Path(fresh.__file__)), str(jobs)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, cwd=scratch)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"the export's check in a fresh process took more than {SECONDS:,} s; nothing was written. Export again "
            "when the machine is less busy"
        ) from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        raise UserError(f"the export does not open in a fresh process: {lines[-1].strip()}; nothing was written")
