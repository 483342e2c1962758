"""The script that opens exports in a fresh process; it imports prunekit only for jobs that allow it.

Start it as `python fresh.py JOBS`. The JSON file JOBS lists the exports to open. A job gives the form, the folder, the
calls (files of input and output tensors, arguments that hold tensors, plain arguments), and whether prunekit may be
imported. Jobs without prunekit run first; until they are done, importing prunekit raises an error.
"""

import importlib.abc
import json
import sys
from pathlib import Path

GRAPHS = ("onnx", "torch")


class Forbidden(importlib.abc.MetaPathFinder):
    """An import finder that makes an installed prunekit look as if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        """Raise ModuleNotFoundError for prunekit; leave all other modules to other finders."""
        if name.partition(".")[0] == "prunekit":
            raise ModuleNotFoundError(f"No module named {name!r} (it is kept out here)", name=name)


def open_model(form: str, folder: str):
    """Open an export as a user of its form would; return a function from named arguments to the denoiser's output.

    For a prompt-routed pipeline, the function is the one that `routes` returns.
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
    """Return a function from prompts, as bytes, to the number of each prompt's expert, counted from 1."""
    return lambda inputs: pipeline.route(bytes(inputs["prompts"].tolist()).decode().split("\n")).double() + 1


def first_output(model, arguments):
    """Return a denoiser's raw output as one tensor; a list of tensors is stacked."""
    output = model(**arguments, return_dict=False)[0]
    if isinstance(output, list):
        import torch

        return torch.stack(output)
    return output


def gathered(tensors, nested, plain):
    """Return the arguments of a call from tensors and plain values; `nested` names the argument that holds a tensor."""
    arguments = dict(plain)
    for name, value in tensors.items():
        if name in nested:
            arguments.setdefault(nested[name], {})[name] = value
        else:
            arguments[name] = value
    return arguments


def main(path: str) -> None:
    """Run all jobs, those without prunekit first, and write the output of each call."""
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
                    if job["form"] not in GRAPHS:  # graphs take the tensors by their own names
                        inputs = gathered(inputs, file["nested"], file["plain"])
                    save_file({"out": call(inputs).contiguous()}, file["out"])


if __name__ == "__main__":
    main(sys.argv[1])
