"""Random changes to recipes: each loads and is written as the same recipe, or is refused in one line.

`PRUNEKIT_FUZZ=100 pytest -m "long or not long" tests/test_fuzz_recipes.py` tries 2,000 recipes, and plans 200 of those
that load.
"""

import os
import tempfile
from functools import cache
from pathlib import Path

import pytest
import yaml
from fuzz_figures import Figures, shown
from fuzzing import HOSTILE, TIMEOUT, forked, fuzzed, measured, mutated
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from prunekit.jobs.bench.bench_recipe import is_benchmark, load_bench_recipe
from prunekit.jobs.plan import Devices, plan_all
from prunekit.jobs.recipe import dump_recipe, load_recipe
from prunekit.jobs.shipped import EXTENDS, shipped_recipes
from prunekit.runtime.errors import UserError

pytestmark = TIMEOUT
NAMES = [name for name, path in shipped_recipes().items() if not is_benchmark(path)]
BENCHMARKS = [name for name, path in shipped_recipes().items() if is_benchmark(path)]
PLANNED = ("quickstart", "quickstart", "aptp_emoji", "codes_emoji", "pretrain_emoji", "norm_cc3m")  # they plan quickly
STATED = Devices(1, 1e12)  # a given speed, so that nothing is timed
RAW = (  # YAML texts that replace a value and that no value is written as
    "!!python/object/apply:os.system [touch ran]",
    "!!python/name:os.system",
    "!!binary aGk=",
    "!!set {a, b}",
    "!!float text",
    "!unknown {}",
    "2001-01-01",
    "12:30:45",
    "0o777",
    "*nothing",
    "&a [*a]",
    "{<<: 3}",
    "{? [1, 2] : 3}",
    "[" * 1500 + "]" * 1500,
    "${name}",
    "${fine_tune}",
    "${nothing.at.all}",
    "${oc.env:HOME}",
    "${${name}}",
    "'\\${name}'",
    "'${'",
    "'\\\\${seed}'",
    '"\\ud800"',
)
MARK = "raw-{}-yaml"
PLAUSIBLE = (  # values that some settings accept
    *(0, 1, 2, 3, 5, 7, 10, 100, 1000, 0.0, 0.1, 0.3, 0.5, 0.9, 1.5, True, False, None, [], {}),
    *("auto", "none", "all", "float32", "bfloat16", "random", "own", "exact", "aptp", "emoji", "train", "x"),
)
VALUES = (*HOSTILE, *(MARK.format(number) for number in range(len(RAW))))


@cache
def content_of(name: str, whole: bool) -> dict:
    """Return a shipped recipe's content. whole: with every setting written out."""
    path = shipped_recipes()[name]
    content = yaml.safe_load(dump_recipe(load_recipe(path)) if whole else path.read_text(encoding="utf-8"))
    if EXTENDS in content:
        content[EXTENDS] = [str(path.parent / base) for base in content[EXTENDS]]
    return content


@st.composite
def recipe_text(draw, names: tuple, most: int = 3, values: tuple = VALUES) -> tuple[str, str]:
    """Return the text of a mutated recipe, and the unmutated text."""
    name = draw(st.sampled_from(names))
    unmutated = content_of(name, name not in BENCHMARKS and draw(st.booleans()))
    content = draw(mutated(unmutated, values, most))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    for number, raw in enumerate(RAW):
        text = text.replace(MARK.format(number), raw)
    extra = draw(st.sampled_from((*[""] * 12, "\0", "\t", "\ufeff", "---\n{}\n", "name: twice\n", "scale: smoke\n")))
    return text + extra, yaml.safe_dump(unmutated)


def write(folder: Path, text: str) -> Path:
    path = folder / "mutated.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def load_and_load_again(folder: Path, text: str, load=load_recipe) -> bool:
    """Load a recipe, write it and load it again; return whether it loaded. Only one-line UserErrors are accepted."""
    path, home = write(folder, text), Path.cwd()
    os.chdir(folder)
    try:
        recipe = load(path)
        if load is load_recipe:
            (folder / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
            again = load_recipe(folder / "again.yaml")
            assert again.model_dump() == recipe.model_dump() and dump_recipe(again) == dump_recipe(recipe)
        return True
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(error).isprintable()
        assert not (folder / "again.yaml").exists(), f"what was written does not load: {error}"
        return False
    finally:
        os.chdir(home)
        assert {entry.name for entry in folder.iterdir()} <= {"mutated.yaml", "again.yaml"}


RECIPES, BENCHMARK_RECIPES, PLANS = Figures("recipes"), Figures("benchmarks"), Figures("plans")
figures = shown(RECIPES, BENCHMARK_RECIPES, PLANS)


def load_all(folder: Path, text: str, load) -> bool:
    """Read a recipe's file as the commands do; return whether it loaded."""
    (folder / "again.yaml").unlink(missing_ok=True)  # from an earlier call
    loaded = load_and_load_again(folder, text, load)
    is_benchmark(folder / "mutated.yaml")
    return loaded


@cache
def seconds_to_load(text: str, load) -> float:
    """Return the CPU time of `load_all` for a recipe that loads."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as folder:
        load_all(Path(first), text, load)  # imports all modules
        outcome = forked(lambda: load_all(Path(folder), text, load), 120)
    assert outcome.kind == "done" and outcome.value, outcome.value
    return outcome.seconds


def check_load(counted: Figures, text: str, unmutated: str, load=load_recipe) -> None:
    whole = seconds_to_load(unmutated, load)
    with tempfile.TemporaryDirectory() as folder, counted.case(text):
        outcome = measured(lambda: load_all(Path(folder), text, load), whole)
        counted.check(outcome, whole, [folder])


@fuzzed(12)
@given(recipe_text(tuple(NAMES)))
def test_a_mutated_recipe_loads_or_is_refused(texts):
    check_load(RECIPES, *texts)


@fuzzed(5)
@given(recipe_text(tuple(BENCHMARKS)))
def test_a_mutated_benchmark_loads_or_is_refused(texts):
    check_load(BENCHMARK_RECIPES, *texts, load_bench_recipe)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_mutated_loads(name, tmp_path):
    assert load_and_load_again(tmp_path, yaml.safe_dump(content_of(name, False)))


CHANGES = (  # each once gave a traceback
    ("quickstart", {"resolution": 10**9}),
    ("quickstart", {"fine_tune": {"steps": 2, "learning_rate": 1e-3, "batch_size": 4 * 10**18}}),
    ("quickstart", {"methods": {"aptp": {"preset": []}}}),
    ("quickstart", {"extends": "a\nb\x1b[31m"}),
    ("pretrain_emoji", {"shapes": {"image_size": 10**9}}),
    ("pretrain_emoji", {"shapes": {"unet_channels": [10**9, 96, 96, 96]}}),
    ("pretrain_emoji", {"shapes": {"unet_heads": [10**6, 6, 6, 6]}}),
    ("pretrain_emoji", {"shapes": {"autoencoder_channels": [3, 3, 3, 3]}}),
    ("bench_sd21_768", {"name": "../../x"}),
    ("bench_sd21_768", {"published": "${oc.env:HOME}"}),
)


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_what_was_a_traceback_or_worse_is_one_line(name, change, tmp_path):
    load = load_bench_recipe if name in BENCHMARKS else load_recipe
    assert not load_and_load_again(tmp_path, yaml.safe_dump({**content_of(name, False), **change}), load)


def plan(path: Path) -> int:
    return len(plan_all([load_recipe(path)], STATED))


@cache
def seconds_of(name: str) -> float:
    """Return the CPU time of planning a shipped recipe."""
    plan(shipped_recipes()[name])  # imports all modules
    outcome = forked(lambda: plan(shipped_recipes()[name]), 120)
    assert outcome.kind == "done", outcome.value
    return outcome.seconds


def check_plan(folder: Path, text: str, name: str) -> None:
    path, whole = write(folder, text), seconds_of(name)
    outcome = measured(lambda: plan(path), whole)
    with PLANS.case(text):
        PLANS.check(outcome, whole, [str(folder)])


@settings(fuzzed(2), suppress_health_check=[HealthCheck.filter_too_much])  # most mutated recipes do not load
@given(st.data())
@pytest.mark.long
def test_a_mutated_recipe_is_planned_or_refused(data):
    name = data.draw(st.sampled_from(PLANNED))
    text, _ = data.draw(recipe_text((name,), 1, PLAUSIBLE))
    with tempfile.TemporaryDirectory() as folder:
        assume(load_and_load_again(Path(folder), text))  # the tests above cover recipes that do not load
        check_plan(Path(folder), text, name)
