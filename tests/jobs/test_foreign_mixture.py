"""A mixture method of another package, with other names of settings, works in plan, check and compare."""

import json
from typing import ClassVar

import pytest
import torch
import yaml
from pydantic import Field
from small_model import TRAINING, write_world

from prunekit.jobs.check import check
from prunekit.jobs.compare.comparing import compare
from prunekit.jobs.plan import Devices, plan
from prunekit.jobs.recipe import load_recipe
from prunekit.jobs.recipe.earlier import as_recorded_now, to_record
from prunekit.methods import Method, PruneResult, PruneSettings, ResultInfo, register, registry, select_mixture
from prunekit.methods.base import budget_cost, describe_result
from prunekit.methods.router import Router
from prunekit.methods.workload import Calibration, MethodWork
from prunekit.runtime.errors import UserError
from prunekit.runtime.randomness import generator

NAME = "branches"
LABEL = "three"


class BranchesSettings(PruneSettings):
    """Settings of Branches."""

    branches: int = Field(3, gt=0, description="how many architectures there are")
    preset: str = Field("wide", description="a name that APTP has too, with another meaning")


class Branches(Method):
    """Random architectures and a random router."""

    Config = BranchesSettings
    smoke: ClassVar = {"branches": 2}
    undistilled: ClassVar = {"preset": "narrow"}

    @property
    def num_models(self):
        return self.config.branches

    def work(self, space):
        calibration = Calibration("sorting", samples=5, forward_passes=space.num_depth, passes="one pass a layer")
        return MethodWork((calibration,), memory_setting="branches")

    def choose(self, pipeline, dataset, directory, log):
        cost, draw = budget_cost(pipeline, self.config), generator(self.config.seed, NAME)
        count, prompts, pairs = self.config.branches, dataset.prompts, dataset.training_pairs()
        router = Router(torch.randn(count, prompts.shape[1], generator=draw), torch.zeros(count))
        counts = torch.bincount(router.route_rows(prompts, pairs), minlength=count)
        router = router.with_fallback(int(counts.argmax())).without((counts == 0).nonzero()[:, 0].tolist())
        experts = select_mixture(torch.rand(count, cost.space.size, generator=draw), counts, cost, self.config.budget)
        info = describe_result(self, experts, cost)
        info.prompts_per_expert, info.extra["preset"] = counts.tolist(), self.config.preset
        return PruneResult(experts, router, info)


@pytest.fixture(autouse=True)
def registered():
    register(NAME)(Branches)
    yield
    del registry._methods[NAME]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    content = {
        "job": "compare",
        **write_world(folder),
        "budgets": [{"budget": 0.7}],
        "methods": {LABEL: {"method": NAME}, "plain": {"method": NAME, "branches": 1, "distillation": False}},
        "fine_tune": {"steps": 6, **TRAINING},
        "protocols": ["equal_steps", "equal_compute"],
        "evaluation": {"num_images": 4, "steps": 1, "batch_size": 4, "num_predictions": 4},
    }
    path = folder / "foreign.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_plan_counts_all_its_models(path):
    content = plan(load_recipe(path), Devices(throughput=1e12, precision="float32"))
    row, work = content["methods"][f"{LABEL} @ 0.7"], {row["stage"]: row for row in content["work"]}
    assert row["experts"] == 3 and content["methods"]["plain @ 0.7"]["experts"] == 1
    steps, batch = 3 * 6 + 3 * 2, TRAINING["batch_size"]  # of both protocols
    assert work[f"{LABEL} @ 0.7: fine-tuning"]["samples"] == steps * batch
    assert work[f"{LABEL} @ 0.7: sorting"]["samples"] == 5
    assert work[f"{LABEL} @ 0.7: sorting"]["passes"] == "one pass a layer"


def test_check_runs_it(path):
    content = check(load_recipe(path))
    stages = [stage.stage for stage in content["stages"]]
    assert f"{LABEL} @ 0.7: choice" in stages and f"{LABEL} @ 0.7: evaluation" in stages and content["seconds"] > 0


def test_it_gets_its_rows_under_both_protocols(path, tmp_path):
    compare([path], (), tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["method"], row["protocol"]): row for row in content["rows"]}
    assert rows[LABEL, "equal_steps"]["models"] == rows[LABEL, "equal_compute"]["models"] == 3
    assert rows[LABEL, "equal_steps"]["steps"] == 6 and rows[LABEL, "equal_compute"]["steps"] == 2
    assert all(row["costs"]["call_ratio"] > 0 for row in rows.values() if row["method"] != "dense")
    chosen = [PruneResult.load(file.parent) for file in tmp_path.glob(f"work/{NAME}-chosen-*/result.json")]
    (mixture,) = [result for result in chosen if len(result.architectures) > 1]
    assert mixture.info.extra == {"preset": "wide"} and mixture.info.to_dict()["preset"] == "wide"
    assert [r.info.settings["preset"] for r in chosen if len(r.architectures) == 1] == ["narrow"]


def test_a_smoke_run_shrinks_it(path):
    recipe = load_recipe(path, ["scale=smoke"])
    assert recipe.method_of(LABEL).num_models == 2 and recipe.method_of("plain").num_models == 1
    assert Branches(branches=5, budget=0.4).shrunk().config == BranchesSettings(branches=2, budget=0.4)


def test_its_settings_are_recorded_as_they_are(path):
    recipe = load_recipe(path, [f"methods.{LABEL}.preset=paper"])
    assert to_record(recipe) == recipe == as_recorded_now(recipe)


class Short(Branches):
    """A method that declares more models than it chooses."""

    num_models = 7


def test_a_wrong_number_of_models_is_refused():
    class Data:
        prompts = torch.randn(4, 6)
        training_pairs = staticmethod(lambda: torch.arange(4))

    from unets import build

    Short.name = "short"
    unet = build("sd2")
    unet.register_to_config(sample_size=8)
    with pytest.raises(UserError, match="short chose 3 architectures, but its num_models is 7"):
        Short(budget=0.8).prune(unet, Data())


def test_extra_keeps_clear_of_the_fields():
    info = ResultInfo(method="x", extra={"mine": [1]})
    assert info.to_dict() == {"method": "x", "mine": [1]} and ResultInfo.from_dict(info.to_dict()) == info
    with pytest.raises(UserError, match=r"extra\['macs'\]: set the field macs"):
        ResultInfo(extra={"macs": [1]}).to_dict()
