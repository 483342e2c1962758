"""Exporting a denoiser as a graph, by ONNX or torch.export, for a fixed batch size or for any."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from prunekit.core.emptied import state_in_files
from prunekit.core.registry import latent_size
from prunekit.export.inputs import Called, example_inputs
from prunekit.export.specification import FORMAT, KEY, weights_hash
from prunekit.export.tiers import architecture_of
from prunekit.runtime.errors import MissingPackageError, UserError, first_line
from prunekit.runtime.files import write_json

FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
SPECIFICATION = "specification.json"
OPSET = 18
MOST_SAMPLES = 63  # largest batch of a graph for any batch: from 64 on, diffusers' upsampler takes another branch
NEEDED = ("onnx", "onnxruntime", "onnxscript")


def check_onnx() -> None:
    """Raise MissingPackageError, with the extra to install, if a package that ONNX needs is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise MissingPackageError(f"exporting to ONNX needs {', '.join(missing)}; pip install 'prunekit[onnx]'")


def save_graph(model: ModelMixin, folder: Path, tier: str, batch: int | None, text_length: int) -> dict[str, Any]:
    """Write a denoiser as `model.onnx` or `model.pt2` with `specification.json`; return the specification.

    tier: "onnx" or "torch". batch: samples per call; None: any number up to 63. text_length: tokens of a text.

    The latent's size is the model's own. The graph's inputs are the tensors of the model's forward pass, by name. A
    tensor in a nested argument has its own name, such as XL's text_embeds and time_ids. ONNX names the output
    `out_sample`.
    """
    if tier == "onnx":
        check_onnx()
    inputs = example_inputs(model, batch or 2, latent_size(model), text_length)
    arguments = inputs.tensors
    batch_axis = torch.export.Dim("batch", min=1, max=MOST_SAMPLES)
    shapes = None if batch else {name: {} if name in inputs.shared else {0: batch_axis} for name in arguments}
    folder.mkdir(parents=True, exist_ok=True)
    path, called = folder / FILES[tier], Called(model, inputs).eval()
    with torch.no_grad(), _silent():
        try:
            program = torch.export.export(called, (), arguments, dynamic_shapes=shapes)
        except torch._dynamo.exc.UserError as error:
            if batch:
                raise
            raise UserError(
                f"a graph of this {type(model).__name__} cannot take any number of samples "
                f"({first_line(error)}); state how many (batch)"
            ) from error
        if tier == "torch":
            with _Patient(path, "w") as file:
                torch.export.save(program, file)
                file.check()
        else:
            try:
                onnx = torch.onnx.export(
                    program,
                    (),
                    kwargs=arguments,
                    input_names=list(arguments),
                    output_names=["out_sample"],
                    opset_version=OPSET,
                    dynamic_shapes=shapes and {name: dict.fromkeys(axes, "batch") for name, axes in shapes.items()},
                    dynamo=True,
                    verbose=False,
                )
            except torch.onnx.OnnxExporterError as error:
                raise UserError(
                    f"torch {torch.__version__} cannot write this {type(model).__name__} as ONNX "
                    f"({first_line(error.__cause__ or error)}); use tier torch"
                ) from error
            assert onnx is not None
            onnx.save(path, external_data=True)
    content = {
        "format": FORMAT,
        "tier": tier,
        "architecture": architecture_of(model),
        "weights": weights_hash(state_in_files(model)),
        "inputs": {
            name: list(value.shape) if name in inputs.shared else [batch or "batch", *value.shape[1:]]
            for name, value in arguments.items()
        },
    }
    write_json(folder / SPECIFICATION, {KEY: content})
    return content


class _Patient(io.FileIO):
    """A new file that keeps the first error of a write and raises it in `check`: torch would end the process at once.

    Data after the error is not written.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of the data; return its size."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while self.error is None and len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return size

    def check(self) -> None:
        """Raise the error of a write that failed."""
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporters' progress and notices from the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
