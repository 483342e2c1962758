"""`precision: auto`: its meaning per device, its record in a run's recipe, and runs from before the setting."""

import pytest
import torch
import yaml
from small_model import RECIPE, write_pipeline, write_world

from prunekit.jobs.compare.cell_runner import CellRunner, key_of
from prunekit.jobs.compare.comparing import Comparison, claim
from prunekit.jobs.plan import Devices, plan
from prunekit.jobs.recipe import (
    dump_recipe,
    load_recipe,
    load_recorded,
    parse_recipe,
    precision_lines,
    precisions,
    resolve_recipe,
)
from prunekit.jobs.run import start
from prunekit.runtime import precision
from prunekit.runtime.run_directory import RECIPE as FILE

CPU = torch.device("cpu")
SEARCH = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}
METHODS = {
    "taylor_sp": {"samples": 4},
    "aptp": {"warmup": 1, "experts": 2, "search": SEARCH},
    "uniarch": {},
    "norm": {"samples": 2},
}
NAMES = {
    "fine_tune.precision",
    "evaluation.precision",
    "methods.taylor_sp.precision",
    "methods.aptp.search.precision",
    "methods.uniarch.search.precision",
}


@pytest.fixture
def hardware(monkeypatch, tmp_path):
    """Return a function that simulates a machine: a processor's flags, and whether a GPU has bfloat16."""

    def choose(flags="", cuda=None, slowdown=1.0):
        monkeypatch.setattr(precision, "slowdown", lambda *given: slowdown)
        monkeypatch.delenv(precision.VARIABLE, raising=False)
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
        monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bool(cuda))

    return choose


def test_a_processor_that_is_slower_with_its_bfloat16_units(hardware):
    hardware("flags : fpu amx_bf16", slowdown=1.4)
    assert precision.resolve_precision("auto", "cpu") == "float32"
    assert precision.resolve_precision("bfloat16", "cpu") == "bfloat16"
    assert precision.why("cpu") == "this CPU has bfloat16 units, and takes 1.4 times as long with them"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f", "float32"),
        ("flags\t\t: fpu avx2 avx512_bf16", "bfloat16"),
        ("flags\t\t: fpu amx_bf16 amx_tile", "bfloat16"),
        ("Features\t: fp asimd bf16", "bfloat16"),
        ("Features\t: fp asimd", "float32"),
        ("", "float32"),
    ],
)
def test_a_processor(flags, expected, hardware):
    hardware(flags)
    assert precision.resolve_precision("auto", CPU) == expected
    assert precision.resolve_precision("float16", CPU) == "float16"
    assert precision.autocast("auto", CPU)._enabled == (expected != "float32")


def test_a_gpu(hardware):
    hardware(cuda=True)
    assert precision.resolve_precision("auto", "cuda") == "bfloat16"
    hardware(cuda=False)
    assert precision.resolve_precision("auto", "cuda") == "float16"
    assert precision.resolve_precision("auto", "cuda", scaled=False) == "float32"  # float16 needs loss scaling


def test_the_variable_decides(monkeypatch):
    monkeypatch.setenv(precision.VARIABLE, "bfloat16")
    assert precision.resolve_precision("auto", CPU) == "bfloat16" and "says so" in precision.why(CPU)
    monkeypatch.setenv(precision.VARIABLE, "float8")
    with pytest.raises(ValueError, match="set it to float32, bfloat16 or float16"):
        precision.resolve_precision("auto", CPU)


def test_every_precision_of_a_recipe_is_resolved_and_read_back():
    recipe = parse_recipe({**RECIPE, "methods": METHODS})
    assert set(precisions(recipe)) == NAMES and set(precisions(recipe).values()) == {"auto"}
    resolved = resolve_recipe(recipe, CPU, meaning="bfloat16")
    assert set(precisions(resolved)) == NAMES and set(precisions(resolved).values()) == {"bfloat16"}
    assert resolved.methods["aptp"]["search"] == {**SEARCH, "precision": "bfloat16"}
    assert parse_recipe(yaml.safe_load(dump_recipe(resolved))) == resolved
    assert resolve_recipe(recipe, CPU, recorded=resolved) == resolved  # the record overrides this machine's choice
    halves = precisions(resolve_recipe(recipe, CPU, meaning="float16"))
    assert halves.pop("methods.taylor_sp.precision") == "float32" and set(halves.values()) == {"float16"}
    written = resolve_recipe(parse_recipe({**RECIPE, "evaluation": {"precision": "float16"}}), CPU, meaning="bfloat16")
    assert precisions(written)["evaluation.precision"] == "float16"  # an explicit value stays


def test_what_an_old_run_did_not_write_has_its_old_default(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "methods": METHODS}))
    assert set(precisions(load_recorded(tmp_path / "recipe.yaml")).values()) == {"float32"}


def test_a_slow_precision_is_said_with_its_factor(hardware, monkeypatch):
    hardware()
    slow = "prunekit.jobs.recipe.auto_precision.slowdown"
    monkeypatch.setattr(slow, lambda value, kind: 1.0 if value == "float32" else 20.4)
    recipe = parse_recipe({**RECIPE, "evaluation": {"precision": "bfloat16"}})
    lines = precision_lines(resolve_recipe(recipe, CPU), CPU)
    assert lines[0].startswith("precision: float32 in fine_tune; bfloat16 in evaluation (auto means float32 here")
    assert "bfloat16 takes 20 times as long" in lines[1] and "evaluation.precision" in lines[1]
    hardware("flags: avx512_bf16")
    assert len(precision_lines(resolve_recipe(recipe, CPU), CPU)) == 1


def test_slowdown_is_a_ratio():
    assert precision.slowdown("float32") == 1.0 and precision.slowdown("bfloat16", "cuda") == 1.0
    assert 0.05 < precision.slowdown("bfloat16") < 1000


@pytest.mark.long
def test_plans_count_in_the_precision_of_the_device(tmp_path):
    model = str(write_pipeline(tmp_path / "model", layers=1))
    recipe = parse_recipe({**RECIPE, "model": model})
    explicit = {name: {**RECIPE[name], "precision": "bfloat16"} for name in ("fine_tune", "evaluation")}
    given = parse_recipe({**RECIPE, "model": model, **explicit})
    whole, halved, same = (
        plan(one, Devices(throughput=1e12, precision=name))
        for one, name in ((recipe, "float32"), (recipe, "bfloat16"), (given, "float32"))
    )
    assert set(halved["precision"].values()) == {"bfloat16"}
    assert halved["memory"] == same["memory"] != whole["memory"]


@pytest.mark.long
def test_a_run_resumes_in_the_precision_that_it_began_with(tmp_path, monkeypatch):
    settings = write_world(tmp_path)
    content = {**settings, "prune": {"budget": 0.7}, "methods": {"norm": {"samples": 2}}}
    content["fine_tune"] = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    content["evaluation"] = {"num_images": 2, "steps": 1, "batch_size": 2, "num_predictions": 2, "num_pictures": 1}
    path = tmp_path / "auto.yaml"
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setenv(precision.VARIABLE, "bfloat16")
    folder = start(path, (), tmp_path / "run")
    assert set(precisions(load_recipe(folder / FILE)).values()) == {"bfloat16"}
    results = yaml.safe_load((folder / "results.json").read_text())
    assert set(results["precision"].values()) == {"bfloat16"} and results["environment"]["precision"] == "bfloat16"
    log = (folder / "log.jsonl").read_text()
    assert "precision: bfloat16 in fine_tune, evaluation" in log
    monkeypatch.setenv(precision.VARIABLE, "float32")  # as on another machine
    before = (folder / FILE).read_bytes()
    start(path, (), tmp_path / "run")
    assert (folder / FILE).read_bytes() == before
    with pytest.raises(ValueError, match=r"fine_tune.precision is 'bfloat16' there and 'float32' here"):
        start(path, ["fine_tune.precision=float32"], tmp_path / "run")


def test_a_cells_key_holds_the_resolved_precision(tmp_path, monkeypatch):
    settings = write_world(tmp_path)
    content = {**settings, "job": "compare", "methods": {"norm": {"samples": 2}}, "budgets": [{"budget": 0.7}]}
    content["fine_tune"] = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    content["evaluation"] = {"num_images": 2, "steps": 1}

    def keys(folder, **explicit):
        recipe = parse_recipe({**content, "fine_tune": {**content["fine_tune"], **explicit}})
        (tmp_path / folder).mkdir(exist_ok=True)
        comparison = Comparison(claim(tmp_path / folder, recipe), tmp_path / folder)
        runner = CellRunner(comparison.recipe, comparison.directory, comparison.stages)
        return [key_of(runner.fields(cell)) for cell in runner.cells]

    monkeypatch.setenv(precision.VARIABLE, "float32")
    whole = keys("auto")
    assert whole[1] == keys("explicit", precision="float32")[1] != keys("other", precision="bfloat16")[1]
    monkeypatch.setenv(precision.VARIABLE, "bfloat16")  # as on another machine with the same directory
    assert keys("auto") == whole and keys("fresh") != whole
