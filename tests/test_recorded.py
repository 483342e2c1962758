"""Files of version 0.1 still open: module names in files, runs, comparisons, and pipelines that diffusers saved.

`goldens/recorded/` was written by commit 3a26719: a small run of norm and aptp, a comparison, the index of a pipeline
with a pruned UNet, and the configuration of a PEFT adapter on one. Weights and pictures were left out.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from small_pipeline import pipeline_of
from unets import build

import prunekit as pk
from prunekit.jobs.compare.cell_runner import key_of
from prunekit.jobs.recipe import CompareRecipe, PruneRecipe, load_recorded
from prunekit.methods import PruneResult, Scores
from prunekit.methods.router import Router
from prunekit.report import write_report
from prunekit.report.comparison_table import rows_of

RECORDED = Path(__file__).parent / "goldens" / "recorded"
TEXTS = sorted(path for path in RECORDED.rglob("*") if path.suffix in (".json", ".yaml", ".jsonl"))
NAME = re.compile(r"\bprunekit(?:\.[a-z_]\w*)+")
MADE = ("prunekit.export.load_pipeline_directory", "prunekit.export.slice_lora")  # in exports' cards and class files


@pytest.fixture
def recorded(tmp_path):
    return shutil.copytree(RECORDED, tmp_path / "recorded")


@pytest.mark.long
def test_every_recorded_name_is_found_in_a_fresh_process():
    names = {name for path in TEXTS for name in NAME.findall(path.read_text(encoding="utf-8"))}
    assert names == {"prunekit.slicing"}
    code = f"import pkgutil; [pkgutil.resolve_name(name) for name in {sorted({*names, *MADE})}]"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.long
def test_an_adapters_base_class_is_found():
    found = json.loads((RECORDED / "adapter" / "adapter_config.json").read_text())["auto_mapping"]
    code = f"import importlib; print(importlib.import_module({found['parent_library']!r}).{found['base_model_class']})"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "PrunedUNet2DConditionModel" in printed


@pytest.mark.long
def test_a_pipeline_that_diffusers_saved_opens(tmp_path):
    unet = build("sd1")
    pruned = pk.slice_unet(unet, pk.discover(unet, depth="all").random(0.6, seed=2))
    pipeline_of(StableDiffusionPipeline, pruned).save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index, then = (json.loads(file.read_text()) for file in (path, RECORDED / "pipeline" / "model_index.json"))
    path.write_text(json.dumps({**index, "unet": then["unet"]}))
    code = (
        "import sys, prunekit.slicing; from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], text_encoder=None, tokenizer=None)\n"
        "print(type(pipeline.unet).__name__, pipeline.unet.num_parameters())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert printed[-2:] == ["PrunedUNet2DConditionModel", str(pruned.num_parameters())]


def test_a_runs_results_open():
    recipe = load_recorded(RECORDED / "run" / "recipe.yaml")
    assert isinstance(recipe, PruneRecipe) and set(recipe.methods) == {"norm", "aptp"}
    norm, aptp = (RECORDED / "run" / "methods" / name for name in ("norm", "aptp"))
    assert len(PruneResult.load(aptp).architectures) == Router.load(aptp).num_experts == 2
    (architecture,) = PruneResult.load(norm).architectures
    assert Scores.load(norm / "scores.safetensors").space == architecture.space


def test_a_comparisons_cells_open_and_keep_their_keys():
    folder = RECORDED / "comparison"
    assert isinstance(load_recorded(folder / "recipe.yaml"), CompareRecipe)
    cells = [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))]
    assert [row.method for row in rows_of(cells)] == ["dense", "norm"]
    assert [key_of(cell["fields"]) for cell in cells] == [cell["key"] for cell in cells]


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_a_report_is_written(recorded, name):
    text = write_report(recorded / name).read_text(encoding="utf-8")
    title = yaml.safe_load((recorded / name / "recipe.yaml").read_text())["name"]
    assert title in text and "what the run holds cannot be read" not in text
