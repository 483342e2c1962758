"""The program of the fresh process that opens an export: a script of its own, which imports nothing of prunekit.

It is started as `python fresh.py JOBS`, where the JSON file JOBS lists what to open: the form, the folder, what it is
called with (files with tensors in and out, arguments that hold tensors, plain ones), and whether prunekit may be
imported. Until all that must open without it is done, it cannot be.
"""

import importlib.abc
import json
import sys
from pathlib import Path

GRAPHS = ("onnx", "torch")


class Forbidden(importlib.abc.MetaPathFinder):
    """Makes an installed prunekit look as if it were not there."""

    def find_spec(self, name, path=None, target=None):
        """Refuse prunekit, leave everything else to others."""
        if name.partition(".")[0] == "prunekit":
            raise ModuleNotFoundError(f"No module named {name!r} (it is kept out here)", name=name)


def open_model(form: str, folder: str):
    """Return a function from named arguments to the denoiser's output, opened as a user of that form would.

    Of a prompt-routed pipeline: from prompts, as bytes, to one more than their experts.
    """
    import torch

    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]
        return lambda inputs: torch.from_numpy(session.run(None, {n: inputs[n].numpy() for n in names})[0])
    if form == "torch":
        module = torch.export.load(Path(folder) / "model.pt2").module()
        return lambda inputs: module(**inputs)
    if form == "routed":
        import prunekit

        return routes(prunekit.PromptRoutedPipeline.from_pretrained(folder, device="cpu", max_resident=1))
    if form == "mixture":
        from diffusers import DiffusionPipeline

        return routes(DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True))
    if form in ("stock", "single-file"):
        import diffusers

        kind = getattr(diffusers, json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["_class_name"])
        if form == "stock":
            model = kind.from_pretrained(folder)
        else:
            model = kind.from_single_file(str(Path(folder) / "model.safetensors"), config=folder, local_files_only=True)
    elif form == "class":
        from diffusers import AutoModel

        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    elif form == "pipeline":
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        model = getattr(pipeline, "transformer", None) or pipeline.unet
    else:
        from prunekit.core.slicing import load_model

        model = load_model(folder)
    model.eval()
    return lambda inputs: first_output(model, inputs)


def routes(pipeline):
    """Return a function from prompts, as bytes, to one more than their experts."""
    return lambda inputs: pipeline.route(bytes(inputs["prompts"].tolist()).decode().split("\n")).double() + 1


def first_output(model, arguments):
    """Return what a denoiser predicts, before anything is done with it; one tensor, also of those that give a list."""
    output = model(**arguments, return_dict=False)[0]
    if isinstance(output, list):
        import torch

        return torch.stack(output)
    return output


def gathered(tensors, nested, plain):
    """Return the arguments of a call: tensors, those of a nested argument together, and plain values."""
    arguments = dict(plain)
    for name, value in tensors.items():
        if name in nested:
            arguments.setdefault(nested[name], {})[name] = value
        else:
            arguments[name] = value
    return arguments


def main(path: str) -> None:
    """Open everything that the jobs name, first what must open without prunekit, and write each output."""
    jobs = json.loads(Path(path).read_text(encoding="utf-8"))
    forbidden = Forbidden()
    sys.meta_path.insert(0, forbidden)
    import torch
    from diffusers.utils import logging
    from safetensors.torch import load_file, save_file

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    for with_prunekit in (False, True):
        if with_prunekit:
            assert not any(name.partition(".")[0] == "prunekit" for name in sys.modules)
            sys.meta_path.remove(forbidden)
        for job in jobs:
            if job["prunekit"] is with_prunekit:
                call = open_model(job["form"], job["folder"])
                for file in job["files"]:
                    inputs = load_file(file["in"])
                    if job["form"] not in GRAPHS:  # those take the tensors as they are
                        inputs = gathered(inputs, file["nested"], file["plain"])
                    save_file({"out": call(inputs).contiguous()}, file["out"])


if __name__ == "__main__":
    main(sys.argv[1])
