"""Hostile recipes, names, configs and arguments that once did damage; each gets a one-line error before any work."""

import json
import shutil

import pytest
import torch
import yaml
from command_line import refused
from small_model import RECIPE, write_pipeline, write_world

from prunekit.data.prompt_encoder import PROMPT_ENCODER_DIRECTORY, load_prompt_encoder
from prunekit.evaluation.sheets import PictureRow, picture_sheet
from prunekit.evaluation.table import Column, markdown_table
from prunekit.jobs.recipe import RecipeError, load_recipe, parse_recipe
from prunekit.jobs.run import start
from prunekit.jobs.stages import errors_of_plug_ins
from prunekit.methods import TaylorSP, register, registry
from prunekit.methods.base import ScoreMethod
from prunekit.methods.settings import PruneSettings
from prunekit.models import load_pipeline, load_unet_on_meta
from prunekit.models.shapes import unet_from_config
from prunekit.report.trust import warnings_of
from prunekit.runtime.errors import UserError, markdown_cell
from prunekit.serving.prompts import read_prompts

COMPARE = {**RECIPE, "job": "compare", "prune": {}, "budgets": [{"budget": 0.7}]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({**RECIPE, "name": "/tmp/elsewhere"}, "plain name"),
        ({**RECIPE, "name": ".."}, "plain name"),
        ({**RECIPE, "name": ""}, "plain name"),
        ({**RECIPE, "name": "a\nb"}, "plain name"),
        ({**COMPARE, "methods": {"../../../elsewhere": {"method": "norm"}}}, "plain name"),
        ({**COMPARE, "budgets": [{"budget": "bksdm:../../x"}]}, "bksdm:VARIANT"),
        ({**COMPARE, "methods": {"row": {"method": {"a": 1}}}}, "should be a valid string"),
        ({**COMPARE, "budgets": [{"budget": 0.5, "seed": 3}]}, "unknown setting"),
        ({**RECIPE, "job": {"a": 1}}, "allowed: prune"),
        ({**RECIPE, "scale": ["smoke"]}, "allowed: full, smoke"),
        ({**RECIPE, 3: 4}, "names of settings must be text"),
        ({**RECIPE, "seed": 2**63}, "seed"),
        ({**RECIPE, "prune": {"budget": 0.7, "seed": 10**23}}, "seed"),
        ({**RECIPE, "fine_tune": {**RECIPE["fine_tune"], "learning_rate": float("inf")}}, "finite"),
        ({**RECIPE, "evaluation": {"guidance": float("nan")}}, "finite|guidance"),
    ],
)
def test_hostile_settings_are_one_line(content, expected):
    with pytest.raises(RecipeError, match=expected) as error:
        parse_recipe(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "name: ${oc.env:PRUNEKIT_SECRET}",
        "name: ${oc.${x}:PRUNEKIT_SECRET}\nx: env",
        "name: a-${oc.decode:'1'}",
        "name: ${ oc.env : PRUNEKIT_SECRET }",
    ],
)
def test_a_recipe_does_not_read_the_environment(text, tmp_path, monkeypatch):
    """Once, a stranger's recipe copied a token from the environment to recipe.yaml, and so to reports and trackers."""
    monkeypatch.setenv("PRUNEKIT_SECRET", "hunter2")
    rest = {key: value for key, value in RECIPE.items() if key != "name"}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(rest) + text + "\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "a.yaml")
    assert "hunter2" not in str(error.value) and "\n" not in str(error.value)


def test_deep_yaml_is_one_line(tmp_path):
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 3000 + "]" * 3000)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "deep.yaml")


def test_what_a_method_asks_of_fine_tuning_is_checked(monkeypatch):
    """pydantic's `model_copy` does not validate changes, so once `feature_blokcs` was accepted."""
    recipe = parse_recipe(RECIPE)
    norm = type(recipe.method("norm"))
    for asked in ({"feature_blokcs": "all"}, {"distillation_weight": -5.0}):
        monkeypatch.setattr(norm, "fine_tuning", lambda self, asked=asked: asked)
        with pytest.raises(ValueError, match=next(iter(asked))):
            recipe.fine_tuning("norm")


def test_pictures_and_tables_show_any_text(tmp_path):
    """Once, a dollar sign started a formula, a line break ended a row, and HTML was not escaped."""
    rows = [PictureRow("label $x_{$", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))]
    assert picture_sheet(tmp_path / "sheet.png", rows, ["caption $y^{$"], "cost $x_{$").is_file()
    hostile = "a\nb | <script>x</script> \\| $"
    assert markdown_cell(hostile) == "a b \\| &lt;script&gt;x&lt;/script&gt; \\\\\\| $"
    text = markdown_table([{"name": hostile}], [Column("name", "model")])
    assert text.count("\n") == 3 and "<script" not in text


def test_a_missing_evaluator_is_refused_before_anything_is_made(tmp_path):
    """Once, it was refused only after all models were trained."""
    content = {**write_world(tmp_path), "methods": {"norm": {}}, "prune": {"budget": 0.7}, "evaluator": "nope/x"}
    content |= {key: RECIPE[key] for key in ("fine_tune", "evaluation")}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="nope/x"):
        start(tmp_path / "a.yaml", (), tmp_path / "run")
    assert not (tmp_path / "run" / "methods").exists()


CONFIGS = {
    "zero division": {"norm_num_groups": 0},
    "text for a number": {"block_out_channels": "wide"},
    "missing list": {"down_block_types": None},
    "too many layers": {"layers_per_block": 3000},
    "deep list": {"transformer_layers_per_block": [[[10**6]]]},
    "odd class": {"_class_name": ["UNet2DConditionModel"]},
    "bool": {"attention_head_dim": True},
    "negative": {"in_channels": -4},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_damaged_configs_are_one_line(change, tmp_path):
    """Once, damaged configs gave tracebacks, and a config of 3,000 layers took more than 30 seconds."""
    folder = write_pipeline(tmp_path / "model", layers=1)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for load in (load_unet_on_meta, load_pipeline):
        try:
            load(folder)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["model_index.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", "nul", '{"a": ' * 5000, '{"_class_name": 3}'])
def test_damaged_pipelines_are_one_line(name, text, tmp_path):
    folder = write_pipeline(tmp_path / "model", layers=1)
    (folder / name).write_text(text)
    try:
        load_pipeline(folder)
    except UserError as error:
        assert "\n" not in str(error)


def test_a_width_for_each_level_is_taken(tmp_path):
    """Once, Norm crashed on a config with a list of text widths, one per level."""
    config = dict(load_unet_on_meta("sd-1.5").config)
    unet = unet_from_config({**config, "cross_attention_dim": [768] * 4, "block_out_channels": [32, 32, 32, 32]}, "x")
    from prunekit.methods.calibration import _random_call

    assert _random_call(unet, 0, range(2))["encoder_hidden_states"].shape == (2, 77, 768)


def test_arguments_that_were_tracebacks(tmp_path):
    """Once, these arguments gave tracebacks."""
    (tmp_path / "latin.txt").write_bytes("gr\xfcn".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_prompts(tmp_path / "latin.txt")
    assert "65535" in refused("demo", tmp_path, "--port", 99999999)


def test_a_smoke_runs_page_says_so():
    class Source:
        chosen, results, log, cells, is_comparison = {}, {}, [], [], False
        recipe = parse_recipe({**RECIPE, "scale": "smoke"}).model_dump()

    assert any("figures have no meaning" in line for line in warnings_of(Source()))


def test_only_the_users_errors_are_one_line(monkeypatch):
    """Once, the traceback of every ValueError raised in prunekit's code was hidden, such as that of a failed zip."""
    from prunekit.cli import is_users

    assert is_users(UserError("x")) and is_users(FileNotFoundError("x"))
    try:
        list(zip([1], [1, 2], strict=True))
    except ValueError as error:
        assert not is_users(error)


def test_a_plug_ins_own_value_error_is_one_line(monkeypatch):
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    @register("plug_in")
    class PlugIn(ScoreMethod):
        """Raise."""

        Config = PruneSettings

    PlugIn.__module__ = __name__
    with pytest.raises(UserError, match="plug_in: give more data"), errors_of_plug_ins(PlugIn()):
        raise ValueError("give more data")
    with pytest.raises(ValueError, match="Expecting value") as error, errors_of_plug_ins(PlugIn()):
        json.loads("x")
    assert not isinstance(error.value, UserError)  # raised in a library that it calls
    with pytest.raises(ValueError, match="x") as error, errors_of_plug_ins(TaylorSP()):
        raise ValueError("x")
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize("kind", ["evil.Evil", "sentence_transformersevil.Evil", 3, None])
def test_a_strangers_prompt_encoder_runs_no_code(kind, tmp_path, monkeypatch):
    """Once, sentence-transformers 5 imported the class that a directory's modules.json names."""
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "prompt_encoder"
    shutil.copytree(PROMPT_ENCODER_DIRECTORY, folder)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([{**modules[0], "type": kind}, *modules[1:]]))
    with pytest.raises(UserError, match="may run any code"):
        load_prompt_encoder(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "modules.json").write_text('[{"type": ' * 3)
    with pytest.raises(UserError, match="cannot be read"):
        load_prompt_encoder(folder)
