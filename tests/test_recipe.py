import pytest
import yaml
from small_model import RECIPE

from prunekit.recipe import PretrainRecipe, PruneRecipe, RecipeError, dump_recipe, load_recipe, parse_recipe


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
    assert recipe.fine_tune.steps == 2 and recipe.evaluation.num_images == 4


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
        ("seed=-1", "seed=-1"),
        ("methods={}", "methods"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_change(path, override, expected):
    with pytest.raises(RecipeError) as error:
        content = [override]
        recipe = load_recipe(path, content)
        if override == "methods={}":  # merged with the file's, so there is still one
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
