"""An exported mixture is a single diffusers pipeline, which runs in a process without prunekit."""

import inspect
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_mixture import PROMPTS, write_mixture

import prunekit as pk
from prunekit import PromptRoutedPipeline
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.export.bundle import bundle
from prunekit.export.fresh import Forbidden
from prunekit.methods.router import Router
from prunekit.models import load_pipeline
from prunekit.runtime.files import read_json, write_json

CALL = {"num_inference_steps": 2, "output_type": "np"}
LOADED = {"custom_pipeline": "pipeline", "trust_remote_code": True}
NEEDED = ("torch", "diffusers", "numpy", "safetensors", "sentence_transformers")
OPENED = f"""
import importlib.abc, sys
{inspect.getsource(Forbidden)}
sys.meta_path.insert(0, Forbidden())
"""
OPENED += """
import json, numpy as np, torch
from diffusers import DiffusionPipeline
jobs = json.loads(sys.argv[1])
pipelines = [DiffusionPipeline.from_pretrained(folder, **json.loads(sys.argv[2])) for folder, _ in jobs]
for (folder, prompts), pipeline in zip(jobs, pipelines):
    drawn = pipeline(prompts, seeds=0, **json.loads(sys.argv[3]))
    one = pipeline(prompts[0], generator=torch.Generator().manual_seed(0), **json.loads(sys.argv[3]))
    stock = pipeline.stock_pipeline(drawn.experts[0])
    options = {"guidance_scale": pipeline.mixture.guidance, **json.loads(sys.argv[3])}
    alone = stock(prompts[0], generator=torch.Generator().manual_seed(0), **options)
    np.savez(f"{folder}/drawn.npz", images=drawn.images, experts=drawn.experts, seeds=drawn.seeds, one=one.images[0],
             alone=alone.images[0])
assert not any(name.split(".")[0] == "prunekit" for name in sys.modules)
"""


def from_both_experts(pipeline):
    """Return two prompts per expert of two experts, alternating."""
    experts = pipeline.route(PROMPTS).tolist()
    own = [[p for p, e in zip(PROMPTS, experts, strict=True) if e == which] for which in sorted(set(experts))[:2]]
    return [own[0][0], own[1][0], own[0][1], own[1][1]]


@pytest.fixture(scope="module")
def unets(tmp_path_factory):
    """Return a mixture of three UNets, one of which a stock config can express, and its folder."""
    place = tmp_path_factory.mktemp("unets")
    pipeline = PromptRoutedPipeline.from_pretrained(write_mixture(place / "run", 3, depth_only=(1,)), device="cpu")
    pipeline.save_pretrained(place / "saved")
    return pipeline, place / "saved"


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """Return a mixture of two experts of the embedded Stable Diffusion 3, and its folder."""
    stock = load_pipeline("emoji-sd3")
    space = pk.discover(stock.transformer, "all")
    experts = [pk.slice_model(stock.transformer, space.random(keep, seed=1)) for keep in (0.5, 0.7)]
    z = load_prompt_encoder("emoji").encode(PROMPTS)
    weight = torch.randn(2, z.shape[1], generator=torch.Generator().manual_seed(0))
    pipeline = PromptRoutedPipeline.from_experts(stock, experts, Router(weight, -(z @ weight.T).mean(dim=0)))
    folder = tmp_path_factory.mktemp("transformers") / "saved"
    pipeline.save_pretrained(folder)
    return pipeline, folder


@pytest.fixture
def loader(monkeypatch, tmp_path):
    """Return diffusers' loader, which copies code to a temporary folder."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained


@pytest.mark.long
def test_it_draws_the_same_without_prunekit(unets, transformers, tmp_path):
    jobs = [(str(folder), from_both_experts(pipeline)) for pipeline, folder in (unets, transformers)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    arguments = [json.dumps(jobs), json.dumps({**LOADED, "max_resident": 1}), json.dumps(CALL)]
    command = [sys.executable, "-I", "-c", OPENED, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not expected" not in done.stderr and "deprecated" not in done.stderr, done.stderr
    torch.set_num_threads(1)
    for (folder, prompts), (pipeline, _) in zip(jobs, (unets, transformers), strict=True):
        theirs, ours = np.load(f"{folder}/drawn.npz"), pipeline(prompts, seeds=0, **CALL)
        assert theirs["experts"].tolist() == ours.experts and len(set(ours.experts)) == 2
        assert theirs["seeds"].tolist() == ours.seeds
        assert np.abs(theirs["images"] - ours.images).max() <= 1e-5  # memory alignment affects the choice of kernels
        for name in ("one", "alone"):
            assert np.abs(theirs[name] - theirs["images"][0]).max() <= 1e-5


def test_prunekit_opens_the_folder_and_runs_none_of_its_code(unets, tmp_path):
    pipeline, folder = unets
    for name in ("pipeline.py", "experts/mixture.py"):
        compile((folder / name).read_text(), name, "exec")
    again = PromptRoutedPipeline.from_pretrained(folder, device="cpu", max_resident=1)
    ours, theirs = (p(PROMPTS[:3], seeds=0, **CALL) for p in (pipeline, again))
    assert ours.experts == theirs.experts and np.abs(ours.images - theirs.images).max() <= 1e-5
    assert "diffusers_modules.local.pipeline" not in sys.modules
    again.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again" / "model_index.json") == read_json(folder / "model_index.json")


def test_a_folder_of_the_first_format_opens(unets):
    pipeline, folder = unets
    index, content = (read_json(folder / name) for name in ("model_index.json", "routed.json"))
    old = {key: value for key, value in index.items() if key != "experts"}
    write_json(folder / "model_index.json", {**old, "_class_name": "StableDiffusionPipeline", "unet": [None, None]})
    new = ("pipeline", "latent_size")
    write_json(folder / "routed.json", {**{k: v for k, v in content.items() if k not in new}, "format": 1})
    try:
        again = PromptRoutedPipeline.from_pretrained(folder, device="cpu")
        assert again.route(PROMPTS).tolist() == pipeline.route(PROMPTS).tolist()
        write_json(folder / "routed.json", {**content, "format": 3})
        with pytest.raises(ValueError, match="reads formats 1 and 2"):
            PromptRoutedPipeline.from_pretrained(folder, device="cpu")
    finally:
        write_json(folder / "model_index.json", index)
        write_json(folder / "routed.json", content)


def test_experts_are_loaded_when_used_or_at_once(unets, loader):
    _, folder = unets
    lazy = loader(folder, **LOADED, max_resident=1)
    assert lazy.mixture.experts.resident == []
    for expert in (0, 2, 1):
        lazy("red apple", experts=[expert], seeds=0, num_inference_steps=1)
        assert lazy.mixture.experts.resident == [expert]
    assert sorted(loader(folder, **LOADED, preload=True).mixture.experts.resident) == [0, 1, 2]
    with pytest.raises(ValueError, match="preload loads all 3 experts, and max_resident=1 forbids it"):
        loader(folder, **LOADED, preload=True, max_resident=1)


def test_it_moves_and_changes_type_whole(unets, loader):
    _, folder = unets
    half = loader(folder, **LOADED, torch_dtype=torch.bfloat16)
    with half.mixture.experts.use(0) as model:
        assert model.dtype == torch.bfloat16
    half.to(torch.float32)
    with half.mixture.experts.use(0) as model, half.mixture.experts.use(1) as other:
        assert model.dtype == other.dtype == torch.float32
    with pytest.raises(ValueError, match="diffusers cannot save this pipeline"):
        half.save_pretrained(folder / "copy")
    with pytest.raises(ValueError, match="not an argument of StableDiffusionPipeline"):
        half("red apple", guidence=3)


def test_the_calls_of_servers(unets, loader):
    """Load as in SGLang 0.5.23 (runtime/pipelines/diffusers_pipeline.py) and vLLM-Omni 0.30.0 (diffusers_adapter)."""
    pipeline, folder = unets
    given = {"torch_dtype": torch.float32, "trust_remote_code": False, "revision": None}
    with pytest.raises(AttributeError, match="has no attribute"):  # SGLang detects custom code by this error
        loader(str(folder), **given)
    own = loader(str(folder), **{**given, "trust_remote_code": True}, custom_pipeline=str(folder))
    other = loader(str(folder), torch_dtype=torch.float32, **LOADED)
    for served in (own, other):
        served = served.to("cpu")
        asked = {"prompt": PROMPTS[0], "num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "pt"}
        with torch.inference_mode():
            images = served(**asked, generator=torch.Generator("cpu").manual_seed(3)).images
        assert images.shape[:2] == (2, 3)
        ours = pipeline(**asked, generator=torch.Generator().manual_seed(3)).images
        assert (images - ours).abs().max() <= 1e-5


def test_its_code_needs_few_packages(unets):
    _, folder = unets
    for name in ("pipeline.py", "experts/mixture.py"):
        found = re.findall(r"^ *(?:import (\w+)|from (\w+)[\w.]* import)", (folder / name).read_text(), re.MULTILINE)
        packages = {package for line in found for package in line if package}
        assert "torch" in packages and packages - sys.stdlib_module_names <= set(NEEDED)


def test_a_bundle_takes_all_names_of_a_statement_and_may_define_one():
    source = bundle(
        [("prunekit.denoisers.sd3.family", "CLIP_TOKENS")], {}, "Sizes.", "total = CLIP_TOKENS + MOST_TOKENS"
    )
    names = {}
    exec(compile(source, "bundle", "exec"), names)
    assert names["total"] == 77 + 256
    source = bundle([("prunekit.denoisers.sd3.family", "CLIP_TOKENS")], {}, "One size.", enclosed="CLIP_TOKENS")
    names = {}
    exec(compile(source, "bundle", "exec"), names)
    assert names["CLIP_TOKENS"] == 77 and "MOST_TOKENS" not in names
    with pytest.raises(AssertionError, match="two imports give one name"):  # the module copy and the function copy.copy
        bundle([("prunekit.methods.router", "Router"), ("prunekit.serving.routed_call", "RoutedCall")], {}, "Both.")
