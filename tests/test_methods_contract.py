"""What every registered method must do; a new method is tested by being registered.

A method that needs data joins when `dataset_for` returns data for it, and `SMALL` its smallest settings.
"""

import inspect
import json

import pytest
import torch
from pydantic import BaseModel
from unets import SHAPES, build, inputs, relative_error

from prunekit import CostModel, discover
from prunekit.gates import gated
from prunekit.methods import PruneResult, PruneSettings, get, names
from prunekit.slicing import slice_unet

SMALL: dict[str, dict] = {}  # method: settings under which it runs in a second
DATA_FREE = [name for name in names() if not get(name).needs_data]


@pytest.fixture(scope="module")
def unets():
    return {shape: build(shape) for shape in SHAPES}


@pytest.fixture
def dataset_for():
    """Method name -> the data that it is tested with."""
    return lambda name: None


@pytest.fixture
def prune(unets, dataset_for):
    def run(name, shape, directory=None, **settings):
        method = get(name)(**{**SMALL.get(name, {}), **settings})
        return method.prune(unets[shape], dataset_for(name), directory)

    return run


def weights_of(result):
    """Share of the training prompts of each architecture."""
    counts = result.info.get("prompts_per_expert", [1] * len(result.architectures))
    return torch.tensor(counts, dtype=torch.float64) / sum(counts)


@pytest.mark.parametrize("name", names())
def test_a_method_documents_itself(name):
    method = get(name)
    assert method.name == name and method.__doc__ and issubclass(method.Config, PruneSettings)
    check_documented(method.Config, name)
    assert list(inspect.signature(method.prune).parameters)[1:4] == ["pipeline", "dataset", "directory"]
    assert isinstance(method().config.budget, float)


def check_documented(config, where):
    for setting, field in config.model_fields.items():
        assert field.description, f"{where}.{setting} has no description"
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            check_documented(field.annotation, f"{where}.{setting}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DATA_FREE)
def test_budget_is_met_and_the_same_again(name, shape, prune, unets):
    for budget in (0.8, 0.45):
        result, again = (prune(name, shape, budget=budget, depth="all") for _ in range(2))
        assert result.architectures == again.architectures and result.info == again.info
        cost = CostModel(unets[shape], result.space)
        ratios = torch.tensor([cost.ratio(a) for a in result.architectures], dtype=torch.float64)
        assert (weights_of(result) * ratios).sum() <= budget
        assert result.info["ratio"] == ratios.tolist() and all(a.is_boolean for a in result.architectures)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DATA_FREE)
def test_masked_is_sliced(name, shape, prune, unets):
    unet = unets[shape]
    for architecture in prune(name, shape, budget=0.5, depth="all").architectures:
        expert = slice_unet(unet, architecture)
        with torch.no_grad(), gated(unet, architecture.space) as gates:
            gates.set(architecture)
            masked = unet(**inputs(unet)).sample
            sliced = expert(**inputs(unet)).sample
        assert relative_error(masked, sliced) <= 1e-5


@pytest.mark.parametrize("name", DATA_FREE)
def test_result_round_trip(name, prune, unets, tmp_path):
    result = prune(name, "sd1", directory=tmp_path)
    with torch.device("meta"):
        meta = build("sd1", device="meta")
    for of in (None, discover(meta), meta):
        loaded = PruneResult.load(tmp_path, of)
        assert loaded.architectures == result.architectures and loaded.info == result.info
        assert (loaded.router is None) == (result.router is None)
    assert all(path.suffix in (".json", ".safetensors") for path in tmp_path.rglob("*") if path.is_file())
    assert json.loads((tmp_path / "result.json").read_text())["info"]["method"] == name
    with pytest.raises(ValueError, match=r"resnet:|attention:|feedforward:|layer:"):
        PruneResult.load(tmp_path, unets["sdxl"])


def test_result_with_router(unets, tmp_path):
    from prunekit.methods.aptp.router import Router

    space = discover(unets["sd2"])
    router = Router(torch.randn(3, 8), torch.randn(3), fallback=1)
    experts = [space.random(0.7, seed=seed) for seed in range(3)]
    PruneResult(experts, router, {"prompts_per_expert": [3, 2, 1]}).save(tmp_path)
    loaded = PruneResult.load(tmp_path, space)
    z = torch.randn(20, 8)
    assert loaded.architectures == experts and torch.equal(loaded.router.scores(z), router.scores(z))
    assert all(a.space is space for a in loaded.architectures)


def test_load_refuses_what_is_not_a_result(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pruning result"):
        PruneResult.load(tmp_path)
    (tmp_path / "result.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        PruneResult.load(tmp_path)
