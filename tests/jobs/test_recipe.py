"""Recipes: inheritance, overrides and refusals; shipped recipes say how to start them."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
import yaml
from small_model import RECIPE

from prunekit.cli import app
from prunekit.jobs.plan import Devices, plan_all
from prunekit.jobs.recipe import (
    CompareRecipe,
    PretrainRecipe,
    PruneRecipe,
    RecipeError,
    dump_recipe,
    load_recipe,
    parse_recipe,
)
from prunekit.methods.base import space_and_cost
from prunekit.models import load_shape
from prunekit.runtime.errors import UserError
from prunekit.runtime.yaml_files import load_overrides

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.stem.startswith("bench_"))
EMBEDDED = (
    "quickstart",
    "aptp_emoji",
    "aptp_emoji_sd3",
    "pretrain_emoji",
    "pretrain_emoji_sd3",
    "compare_emoji",
    "compare_emoji_sd3",
    "recovery_emoji",
    "settings_emoji",
    "codes_emoji",
    "ablation_emoji",
    "experts_emoji",
)  # recipes that run on one machine without a GPU
STATED = 50e12  # MACs per second; the hours stated in the recipes assume this speed


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


def test_defaults_and_overrides(path):
    recipe = load_recipe(path, ["fine_tune.steps=9", "methods.norm.order=1", "prune.include=[mid_block.*]"])
    assert isinstance(recipe, PruneRecipe) and recipe.model == "emoji" and recipe.seed == 0
    assert recipe.fine_tune.steps == 9 and recipe.fine_tune.batch_size == 4
    norm = recipe.method("norm")
    assert (norm.config.order, norm.config.budget, norm.config.include) == (1, 0.7, ["mid_block.*"])


def test_what_is_written_reads_back_the_same(path, tmp_path):
    recipe = load_recipe(path, ["scale=smoke", "seed=7"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe
    assert load_recipe(copy).method("norm").config.seed == recipe.method("norm").config.seed == 7
    assert recipe.fine_tune.steps == 2 and recipe.evaluation.num_images == 4 and recipe.name == "small_smoke"


@pytest.mark.parametrize("shipped", RECIPES, ids=lambda path: path.stem)
def test_what_a_run_writes_of_a_shipped_recipe_starts_it_again(shipped, tmp_path):
    recipe = load_recipe(shipped)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


def test_methods_take_the_common_settings_and_the_seed(path):
    recipe = load_recipe(path, ["seed=7", "prune.depth=all"])
    assert recipe.method("norm").config.seed == 7 and recipe.method("norm").config.depth == "all"
    assert load_recipe(path, ["seed=7", "prune.seed=2"]).method("norm").config.seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("modle=emoji", "unknown setting 'modle'; did you mean 'model'"),
        ("fine_tune.step=3", "unknown setting 'fine_tune.step'; did you mean 'steps'"),
        ("methods.norm.ordre=1", "did you mean 'order'"),
        ("methods.norm.budget=0.5", "belongs to the section `prune`"),
        ("methods.norm.order=3", "methods.norm.order=3"),
        ("fine_tune.precision=float8", "'float32', 'bfloat16' or 'float16'"),
        ("fine_tune.steps=0", "greater than 0"),
        ("fine_tune.steps=many", "fine_tune.steps='many'"),
        ("data.kind=coco", "data.kind='coco'"),
        ("job=trian", "allowed: prune, pretrain"),
        ("scale=tiny", "scale='tiny'; allowed: full, smoke"),
        ("scal=smoke", "did you mean 'scale'"),
        ("extends=other.yaml", "extends is for recipe files"),
        ("_common.steps=3", "_common is for recipe files"),
        ("evaluation.at_steps=[4]", "above 0 and below fine_tune.steps=4"),
        ("seed=-1", "seed=-1"),
        ("methods={}", "methods"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_change(path, override, expected):
    with pytest.raises(RecipeError) as error:
        content = [override]
        recipe = load_recipe(path, content)
        if override == "methods={}":  # merged with the file's methods, so one method remains
            assert recipe.methods == {"norm": {}}
            parse_recipe({**RECIPE, "methods": {}})
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_no_recipe(path, tmp_path):
    with pytest.raises(RecipeError, match=r"did you mean .*small\.yaml"):
        load_recipe(path.with_name("smal.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match=r"list\.yaml"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("name: [\n")
    with pytest.raises(RecipeError, match=r"broken\.yaml .*cannot be read"):
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(RecipeError, match="'fine_tune' is missing"):
        parse_recipe({key: value for key, value in RECIPE.items() if key != "fine_tune"})


def test_pretraining(tmp_path):
    training = {"steps": 5, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 3}
    parts = ("autoencoder", "decoder", "diffusion", "evaluator")
    content = {"job": "pretrain", "name": "x", "milestones": [2], **{part: dict(training) for part in parts}}
    recipe = parse_recipe(content)
    assert isinstance(recipe, PretrainRecipe) and recipe.diffusion.steps == 5
    smoke = parse_recipe({**content, "scale": "smoke"})
    assert smoke.diffusion.steps == 2 and smoke.milestones == []
    with pytest.raises(RecipeError, match="did you mean 'unet_heads'"):
        parse_recipe({**content, "shapes": {"unet_head": [1]}})


def write(folder, **files):
    """Write recipes into a folder; the keys are names without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_extended_files_come_first_and_later_wins(tmp_path):
    write(tmp_path / "base", model={"model": "sd-1.5", "seed": 1}, data={"extends": "model.yaml", "seed": 2})
    write(tmp_path / "base", tuning={"fine_tune": {**RECIPE["fine_tune"], "steps": 7}, "data": {"holdout": 0.2}})
    rest = {key: value for key, value in RECIPE.items() if key != "fine_tune"}
    own = {"extends": ["base/data.yaml", "base/tuning.yaml"], **rest, "fine_tune": {"batch_size": 2}}
    path = write(tmp_path, own=own) / "own.yaml"
    recipe = load_recipe(path, ["data.holdout=0.3"])
    assert (recipe.model, recipe.seed) == ("sd-1.5", 2)
    assert (recipe.fine_tune.steps, recipe.fine_tune.batch_size) == (7, 2)
    assert (recipe.data.holdout, recipe.data.path) == (0.3, "shards")
    assert "extends" not in dump_recipe(recipe)
    assert load_recipe(write(tmp_path / "elsewhere", run=dump_recipe(recipe)) / "run.yaml") == recipe


def test_common_parts_are_named_and_each_use_may_differ(tmp_path):
    norm = "_norm: {order: 1, samples: 5}\nmethods: {norm: '${_norm}'}\n"
    path = write(tmp_path, base=norm, own={"extends": "base.yaml", **RECIPE, "methods": {"norm": {"samples": 6}}})
    config = load_recipe(path / "own.yaml", ["methods.norm.scope=layer"]).method("norm").config
    assert (config.order, config.samples, config.scope) == (1, 6, "layer")
    write(tmp_path, wrong={**RECIPE, "methods": {"norm": "${_nrom}"}})
    with pytest.raises(RecipeError, match=r"wrong\.yaml .*_nrom") as error:
        load_recipe(path / "wrong.yaml")
    assert "\n" not in str(error.value)


def test_what_cannot_be_extended_is_one_line(tmp_path):
    write(tmp_path, a={"extends": "b.yaml"}, b={"extends": ["c.yaml"]}, c={"extends": "a.yaml"})
    write(
        tmp_path,
        missing={"extends": "d.yaml"},
        odd={"extends": {"a": 1}},
        items="- 1\n",
        of_items={"extends": "items.yaml"},
    )
    for name, message in (
        ("a", r"a\.yaml extends itself: .*a\.yaml -> .*b\.yaml -> .*c\.yaml -> .*a\.yaml"),
        ("missing", r"missing\.yaml extends a missing file: no recipe at .*d\.yaml; did you mean .*\.yaml"),
        ("odd", "give a file, or a list of files"),
        ("of_items", "does not hold a mapping"),
    ):
        with pytest.raises(RecipeError, match=message) as error:
            load_recipe(tmp_path / f"{name}.yaml")
        assert "\n" not in str(error.value)


def test_overrides_may_come_from_an_iterator():
    assert load_overrides(iter(["a.b=1", "c=x"])) == {"a": {"b": 1}, "c": "x"}
    with pytest.raises(UserError, match=r"settings a=1 b=\[1 cannot be read"):
        load_overrides(iter(["a=1", "b=[1"]))


def test_smoke_shrinks_what_the_files_say_and_keeps_overrides(path):
    method = {
        "experts": 16,
        "search": {"steps": 3000, "batch_size": 64, "learning_rate": 1e-3, "checkpoint_steps": 500},
    }
    content = {**RECIPE, "methods": {"aptp": method, "taylor_sp": {}, "bksdm": {"variant": "2,1,1,1"}}}
    content |= {"evaluator": "openai/clip", "prompt_encoder": "x/y", "resolution": 256, "scale": "smoke"}
    content["fine_tune"] = {**RECIPE["fine_tune"], "steps": 50, "micro_batch": 1}
    content["evaluation"] = {"at_steps": [10, 20]}
    content["prune"] = {"budget": 0.7, "resolution": 768}
    path.write_text(yaml.safe_dump(content))
    recipe = load_recipe(path, ["fine_tune.batch_size=3", "prompt_encoder=mine", "methods.taylor_sp.samples=9"])
    aptp, taylor = recipe.method("aptp").config, recipe.method("taylor_sp").config
    assert (aptp.experts, aptp.warmup, aptp.search.steps, aptp.search.checkpoint_steps) == (2, 1, 2, 2)
    assert (taylor.samples, taylor.num_timesteps) == (9, 2) and recipe.method("bksdm").config.variant is None
    assert (recipe.fine_tune.steps, recipe.fine_tune.batch_size, recipe.fine_tune.micro_batch) == (2, 3, 1)
    assert (recipe.prompt_encoder, recipe.evaluator) == ("mine", "emoji")
    assert recipe.resolution is None and recipe.prune.resolution is None and recipe.evaluation.at_steps == [1]
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe  # a recipe that a run wrote is not scaled down again


def test_smoke_shrinks_a_comparison():
    recipe = load_recipe(ROOT / "recipes" / "compare_emoji.yaml", ["scale=smoke"])
    assert isinstance(recipe, CompareRecipe) and [entry.seeds for entry in recipe.budgets] == [[0], [0]]
    assert recipe.method("aptp-shared", 0.5, 0).config.search.steps == 2
    assert recipe.method("aptp", 0.5, 0).config.experts == 2


def commands(path):
    """Return the commands of a recipe's opening comment, each as words; a backslash joins lines."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    text = "\n".join(lines).replace("\\\n", " ")
    found = re.findall(r"^ {5}(?:\w+=\S+ )*((?:prunekit|torchrun) .*)$", text, re.MULTILINE)
    return [shlex.split(line.removesuffix("&"), comments=True) for line in found]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_to_start_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(path)
    assert any(f"recipes/{path.name}" in words for words in found)
    if path.stem not in EMBEDDED:
        assert {words[0] for words in found} == {"prunekit", "torchrun"} and any("--nnodes" in words for words in found)
        assert "scale=smoke" in found[0]
    group = typer.main.get_command(app)
    for words in found:
        words = words[words.index("prunekit") + 1 :]
        command = group.commands[words[0]]
        command.make_context(words[0], list(words[1:]))
        (recipe,) = {word for word in words if word.endswith(".yaml")}
        loaded = load_recipe(recipe, [word for word in words if "=" in word])
        assert Path(recipe).name == path.name and (words[0] == "compare") == isinstance(loaded, CompareRecipe)


@pytest.mark.long
def test_what_a_recipe_says_it_needs_is_its_plan():
    paths = [path for path in RECIPES if path.stem.startswith(("aptp_c", "norm", "taylor", "bksdm", "uniarch"))]
    plans = plan_all([load_recipe(path) for path in paths], Devices(throughput=STATED, precision="bfloat16"))
    for path, content in zip(paths, plans, strict=True):
        text = " ".join(path.read_text(encoding="utf-8").replace("#", " ").split())
        pattern = r"Needs: about (\d+) GPU-hours .* a peak of (\d+) GB of memory .*; (\d+) GB of disk"
        hours, memory, disk = (float(value) for value in re.search(pattern, text).groups())
        planned = (
            content["seconds"] / 3600,
            max(content["memory"]["peak"].values()) / 1e9,
            content["disk"]["total"] / 1e9,
        )
        assert (hours, memory, disk) == pytest.approx(planned, rel=0.1), path.stem


def test_the_papers_settings():
    sizes = {"cc3m_base": (0.85, 16), "cc3m_small": (0.66, 8), "coco_base": (0.78, 8), "coco_small": (0.64, 8)}
    for name, (budget, experts) in sizes.items():
        recipe = load_recipe(ROOT / "recipes" / f"aptp_{name}.yaml")
        config, tuning = recipe.method("aptp").config, recipe.fine_tuning("aptp")
        assert (config.budget, config.experts, config.resolution, recipe.resolution) == (budget, experts, 768, 256)
        assert (config.warmup, config.search.steps, config.search.batch_size, config.search.warmup_steps) == (
            500,
            3000,
            1024,
            100,
        )
        assert config.search.learning_rate == pytest.approx(2e-4 * 1024**0.5)
        assert (config.temperature, config.epsilon, config.sinkhorn_iterations) == (0.4, 0.05, 3)
        assert (config.distillation_weight, config.resource_weight, config.contrastive_weight) == (0.2, 2.0, 100.0)
        assert (config.contrastive_temperature, tuning.batch_size, tuning.learning_rate) == (0.03, 128, 1e-5)
        assert (tuning.denoising_weight, tuning.distillation_weight, tuning.feature_blocks) == (1e-4, 1.0, "all")
        assert (*recipe.evaluation.at_steps, tuning.steps) == (30000, 50000)
        assert (recipe.evaluation.steps, recipe.evaluation.guidance) == (25, 7.5)


@pytest.mark.parametrize("data", ["cc3m", "coco"])
def test_the_papers_bksdm_members_are_within_their_budget(data):
    recipe = load_recipe(ROOT / "recipes" / f"bksdm_{data}.yaml")
    shape, method = load_shape(recipe.model), recipe.method("bksdm")
    with torch.device("meta"):
        result = method.prune(shape)
    _, cost = space_and_cost(shape, method.config)
    assert result.info.ratio[0] <= 0.8215 < result.info.ratio[0] + 1e-4
    assert cost.dense_macs == 1_074_552_872_960
