"""Every shipped recipe with scale=smoke runs through all stages, with small models and data in the recipe's layout."""

from pathlib import Path

import pytest
import small_sdxl
import small_transformer_pipelines
from data_layouts import LAYOUTS, emoji, samples
from data_layouts import picture as color_picture
from pages import PAGES, commands
from small_model import write_pipeline
from small_run import check_table

from prunekit.jobs.compare.comparing import compare
from prunekit.jobs.recipe import CompareRecipe, PretrainRecipe, load_recipe
from prunekit.jobs.run import start
from prunekit.models import load_pipeline

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith("bench_"))
SHOWN = {  # recipes of the documentation's pages, which tests/cli/test_commands.py runs
    word.removeprefix("recipes/").removesuffix(".yaml")
    for page in PAGES
    for words in commands(page)
    for word in words
    if words[1:2] in (["run"], ["compare"]) and word.startswith("recipes/")
}
LARGE = [f"{method}_{model}" for method in ("depth", "obs", "aptp") for model in ("sd35", "flux", "qwen_image")]
TRANSFORMERS = dict.fromkeys(("aptp_emoji_sd3", "compare_emoji_sd3", *LARGE), "sd35")
OTHER_MODELS = {"aptp_sd15_coco": "sd1", "aptp_sdxl_folder": "sdxl", **TRANSFORMERS}
# The others prune Stable Diffusion 2's topology. To save time, the models of these recipes have one layer per block,
# which BK-SDM cannot cut.
THIN = ("norm", "taylor_sp", "uniarch", "aptp")
FEWER = [f"evaluation.{key}={few}" for key, few in (("num_images", 2), ("num_predictions", 2), ("steps", 1))]
LESS = {  # fewer rows of the comparisons, which share them, to save time
    "compare_cc3m": [
        "budgets=[{budget: 0.85, methods: [norm-undistilled, bksdm, aptp-base]}]",
        "protocols=[equal_steps]",
    ],
    "compare_coco": ["budgets=[{budget: 0.78, methods: [norm]}, {budget: 0.64, methods: [taylor_sp]}]"],
    "compare_emoji": ["budgets=[{budget: 'bksdm:base', methods: [bksdm, aptp]}]"],
    "compare_emoji_sd3": [
        "budgets=[{budget: 0.7, methods: [obs, norm-refit, aptp-shared]}]",
        "protocols=[equal_steps]",
    ],
    "recovery_emoji": [
        "budgets=[{budget: 0.8, methods: [norm-cut, obs-refit, aptp-lora, norm-refit-tuned]}]",
    ],
    "ablation_emoji": ["budgets=[{budget: 0.8, methods: [aptp-contrastive, aptp-shared]}]"],
    "codes_emoji": ["budgets=[{budget: 0.8, methods: [kmeans_codes]}]"],
    "settings_emoji": ["budgets=[{budget: 0.8, methods: [paper, hard_concrete]}]"],
}
QUICK = {
    "norm_cc3m",
    "pretrain_emoji",
    "aptp_emoji_sd3",
}  # in addition to the recipes of the README, which test_commands.py runs
WRITES_REPORTS = True
PAIRS = 24
OTHER_COLORS = ("#123456", "#fedcba", "#456723")
WRITERS = {writer.__name__.partition("_")[0]: writer for writer in reversed((*LAYOUTS, emoji))}


def write_data(folder: Path, kind: str, count: int = PAIRS) -> str:
    """Write a data set in the published layout of a kind; return `data.path`."""
    options = {"webdataset": {"per_shard": 12}, "coco": {"captions_each": 5, "year": "train2014"}}
    splits = {"webdataset": {"split": "validation"}, "coco": {"year": "val2014"}}
    if kind in splits:
        others = [(color_picture(color, "jpeg"), f"a split of its own {color}") for color in OTHER_COLORS]
        WRITERS[kind](folder, others, **splits[kind])
    return WRITERS[kind](folder, samples(count), **options.get(kind, {}))["path"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "sd2": write_pipeline(folder / "sd2"),
        "thin": write_pipeline(folder / "thin", layers=1),
        **{family: small_sdxl.write(folder / family, family) for family in ("sd1", "sdxl")},
        "sd35": small_transformer_pipelines.write(folder / "sd35", "sd35", load_pipeline("emoji")),
    }


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.long)
        for path in RECIPES
        if path.stem not in SHOWN
    ],
)
def test_every_recipe_reaches_its_table(path, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # recipes have paths relative to the working directory
    recipe = load_recipe(path)
    overrides = ["scale=smoke", f"data.path={write_data(tmp_path / 'data', recipe.data.kind)}"]
    if not isinstance(recipe, PretrainRecipe):
        own = "thin" if path.stem.startswith(THIN) else "sd2"
        overrides += [f"model={models[OTHER_MODELS.get(path.stem, own)]}", *FEWER]
    overrides += LESS.get(path.stem, [])
    run = compare if isinstance(recipe, CompareRecipe) else start
    directory = run([path] if run is compare else path, overrides)
    assert directory == Path("runs") / f"{recipe.name}_smoke"
    if isinstance(recipe, PretrainRecipe):
        assert list(directory.rglob("model_index.json"))
        return
    check_table(directory)
    assert (directory / "report.html").is_file()


@pytest.mark.long
@pytest.mark.parametrize("name", ["sana15", "wan"])
def test_transformers_with_latents_of_their_own_reach_a_table(name, tmp_path, monkeypatch):
    """Autoencoders that downsample by 32, and of videos: encoding, search, recovery, generation and figures."""
    monkeypatch.chdir(tmp_path)
    model = small_transformer_pipelines.write(tmp_path / name, name, load_pipeline("emoji"))
    overrides = ["scale=smoke", f"data.path={write_data(tmp_path / 'data', 'emoji')}", f"model={model}", *FEWER]
    check_table(start(FOLDER / "aptp_emoji_sd3.yaml", [*overrides, "resolution=64"]))
