"""Requirements of every registered method; registering a new method includes it in these tests.

A method that needs data gets small encoded data; `small_methods.SMALL` makes it quick.
"""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from pydantic import BaseModel
from small_data import encoded_for, stub
from small_methods import SMALL, weights_of
from unets import MORE_SHAPES, SHAPES, build, inputs, relative_error

from prunekit import CostModel, discover
from prunekit.core.gates import gated
from prunekit.methods import PruneResult, PruneSettings, ResultInfo, ScoreMethod, get, names
from prunekit.slicing import slice_unet

BUDGET = 0.66  # also reachable for families with fixed members


@pytest.fixture(scope="module")
def unets():
    unets = {shape: build(shape) for shape in SHAPES}
    for unet in unets.values():
        unet.register_to_config(sample_size=8)
    return unets


@pytest.fixture(scope="module")
def dataset_for(unets):
    """Return a function from method name and shape to the test data, or None if the method needs no data."""
    data = {shape: encoded_for(unet) for shape, unet in unets.items()}
    return lambda name, shape: data[shape] if get(name).needs_data else None


@pytest.fixture(scope="module")
def prune(unets, dataset_for):
    def run(name, shape, directory=None, **settings):
        method = get(name)(**{**SMALL.get(name, {}), "depth": "all", "budget": BUDGET, **settings})
        return method.prune(stub(unets[shape]), dataset_for(name, shape), directory)

    return run


@pytest.fixture(scope="module")
def pruned(prune):
    """Return a cached function from method name and shape to the method's result."""
    results = {}

    def get_or_make(name, shape):
        if (name, shape) not in results:
            results[name, shape] = prune(name, shape)
        return results[name, shape]

    return get_or_make


@pytest.mark.parametrize("name", names())
def test_a_method_documents_itself(name):
    method = get(name)
    assert method.name == name and method.__doc__ and issubclass(method.Config, PruneSettings)
    check_documented(method.Config, name)
    assert list(inspect.signature(method.prune).parameters)[1:4] == ["pipeline", "dataset", "directory"]
    assert isinstance(method().config.budget, float)


@pytest.mark.parametrize("name", names())
def test_a_method_declares_what_it_does(name, unets):
    method, space = get(name)(), discover(unets["sd2"], "all")
    small = method.shrunk()
    assert type(small) is type(method) and small.shrunk().config == small.config
    assert 1 <= small.num_models <= method.num_models
    work, shrunk = method.work(space), small.work(space)
    assert len(shrunk.calibrations) == len(work.calibrations) and (shrunk.search is None) == (work.search is None)
    for less, more in zip(shrunk.calibrations, work.calibrations, strict=True):
        assert 0 < less.samples <= more.samples and 0 < less.forward_passes <= more.forward_passes
    if work.search is not None:
        assert shrunk.search.training.steps < work.search.training.steps
    section = method.config
    for part in (work.memory_setting or "").split(".") if work.memory_setting else ():
        assert part in type(section).model_fields
        section = getattr(section, part)
    short = get(name)(**{**method.short_settings(devices=2)})
    assert short.num_models == method.num_models


def check_documented(config, where):
    for setting, field in config.model_fields.items():
        assert field.description, f"{where}.{setting} has no description"
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            check_documented(field.annotation, f"{where}.{setting}")


def without_times(info):
    return replace(info, search={})


@pytest.mark.parametrize("shape", MORE_SHAPES)
@pytest.mark.parametrize("name", names())
def test_budget_is_met_and_the_same_again(name, shape, prune, pruned, unets):
    result, again = pruned(name, shape), prune(name, shape)
    assert result.architectures == again.architectures
    assert without_times(result.info) == without_times(again.info)
    cost = CostModel(unets[shape], result.space)
    ratios = torch.tensor([cost.ratio(a) for a in result.architectures], dtype=torch.float64)
    assert (weights_of(result) * ratios).sum() <= BUDGET
    assert result.info.ratio == ratios.tolist() and all(a.is_boolean for a in result.architectures)


@pytest.mark.parametrize("shape", MORE_SHAPES)
@pytest.mark.parametrize("name", names())
def test_masked_is_sliced(name, shape, pruned, unets):
    unet = unets[shape]
    for architecture in pruned(name, shape).architectures:
        expert = slice_unet(unet, architecture)
        with torch.no_grad(), gated(unet, architecture.space) as gates:
            gates.set(architecture)
            masked = unet(**inputs(unet)).sample
            sliced = expert(**inputs(unet)).sample
        assert relative_error(masked, sliced) <= 1e-5


@pytest.mark.parametrize("name", names())
def test_result_round_trip(name, pruned, unets, tmp_path):
    result = pruned(name, "sd2")
    result.save(tmp_path)
    with torch.device("meta"):
        meta = build("sd2", device="meta")
    for of in (None, discover(meta, result.info.settings["depth"]), meta):
        loaded = PruneResult.load(tmp_path, of)
        assert loaded.architectures == result.architectures and loaded.info == result.info
        assert (loaded.router is None) == (result.router is None)
    assert json.loads((tmp_path / "result.json").read_text())["info"]["method"] == name
    with pytest.raises(ValueError, match=r"resnet:|attention:|feedforward:|layer:"):
        PruneResult.load(tmp_path, unets["sdxl"])


@pytest.mark.parametrize("name", names())
def test_a_directory_gets_the_result_and_scores_for_other_budgets(name, prune, tmp_path):
    small = {"depth": "aptp", "include": "down_blocks.*"} if issubclass(get(name), ScoreMethod) else {}
    result = prune(name, "sd1", tmp_path, **small, **({"budget": 0.9} if small else {}))
    assert PruneResult.load(tmp_path).architectures == result.architectures
    assert all(path.suffix in (".json", ".safetensors") for path in tmp_path.rglob("*") if path.is_file())
    if issubclass(get(name), ScoreMethod):
        written = (tmp_path / "scores.safetensors").stat().st_mtime_ns
        again = prune(name, "sd1", tmp_path, **small, budget=0.85)
        assert again.info.macs[0] < result.info.macs[0]
        assert (tmp_path / "scores.safetensors").stat().st_mtime_ns == written


def test_result_with_router(unets, tmp_path):
    from prunekit.methods.router import Router

    space = discover(unets["sd2"])
    router = Router(torch.randn(3, 8), torch.randn(3), fallback=1)
    experts = [space.random(0.7, seed=seed) for seed in range(3)]
    PruneResult(experts, router, ResultInfo(prompts_per_expert=[3, 2, 1])).save(tmp_path)
    loaded = PruneResult.load(tmp_path, space)
    z = torch.randn(20, 8)
    assert loaded.architectures == experts and torch.equal(loaded.router.scores(z), router.scores(z))
    assert all(a.space is space for a in loaded.architectures)


def test_an_earlier_file_stays_as_it_was(tmp_path):
    """`info` as it was before it had typed fields, with an additional key of another package's method."""
    info = {
        "method": "aptp",
        "settings": {"budget": 0.8, "align": 8, "warmup": 1},
        "sample_size": [8, 6],
        "text_length": 7,
        "convention": "exact",
        "dense_macs": 20,
        "macs": [14, 16],
        "ratio": [0.7, 0.8],
        "dense_params": 10,
        "params": [7, 8],
        "unaligned": [{}, {"resnet:mid_block": 12}],
        "latency_ratio": [0.75, 0.85],
        "latency_table": {"device": "here", "dense": 9, "digest": "x"},
        "prompts_per_expert": [3, 0],
        "assignment": {"nearest": [3, 0], "transport": [2, 1]},
        "mixture_ratio": 0.7,
        "search": {"steps": 3, "seconds": 1.5, "loss": 0.25},
        "gates_ratio": [0.9, 0.9],
        "another": {"key": [1]},
    }
    space = discover(build("sd2", device="meta"))
    PruneResult([space.full(), space.full()]).save(tmp_path)
    path = tmp_path / "result.json"
    content = json.loads(path.read_text())
    assert content["info"] == {}
    path.write_text(json.dumps({**content, "info": info}, indent=1) + "\n")
    written, loaded = path.read_bytes(), PruneResult.load(tmp_path)
    assert loaded.info.sample_size == (8, 6) and loaded.info.extra == {"another": {"key": [1]}}
    assert (loaded.info.mean_ratio, loaded.info.search_seconds) == (0.7, 1.5)
    assert loaded.notes() == ["predicted at 0.7500 of the dense time on here"] and len(loaded.warnings()) == 5
    loaded.save(tmp_path)
    assert path.read_bytes() == written


def test_load_refuses_what_is_not_a_result(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pruning result"):
        PruneResult.load(tmp_path)
    (tmp_path / "result.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        PruneResult.load(tmp_path)
