"""Recovery in a run: a refit is a separate stage that a killed run keeps, and fine-tuning is optional."""

import json

import pytest
import torch
import yaml
from small_model import TRAINING, write_world

from prunekit.core.slicing import load_model, slice_model
from prunekit.jobs import recovering
from prunekit.jobs.plan.plans import Devices, plan
from prunekit.jobs.recipe import load_recipe
from prunekit.jobs.run import start
from prunekit.methods.result import PruneResult
from prunekit.models import load_pipeline
from prunekit.runtime.errors import UserError

REFIT = {"samples": 4, "batch_size": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovery")
    return folder, write_world(folder)


def write(world, name, **changes):
    folder, settings = world
    content = {
        **settings,
        "name": name,
        "prune": {"budget": 0.7},
        "methods": {"norm": {"samples": 2}},
        "fine_tune": {"steps": 2, **TRAINING},
        "evaluation": {"num_images": 4, "steps": 1, "batch_size": 4, "num_predictions": 4, "num_pictures": 2},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def figures_of(run):
    return json.loads((run / "methods" / "norm" / "experts" / "0" / "figures.json").read_text())


def test_a_refit_alone_is_a_run(world):
    recipe = write(world, "refit", recover={"closed_form": REFIT, "fine_tune": False})
    run = start(recipe, (), world[0] / "refit")
    model, figures = run / "methods" / "norm" / "experts" / "0", figures_of(run)
    fits = json.loads((model / "refit.json").read_text())["layers"]
    assert figures["steps"] == 0 and figures["refit_layers"] == len(fits) > 2
    assert not (model / "refitted").exists() and all(fit["after"] <= fit["before"] * (1 + 1e-9) for fit in fits)
    dense = load_pipeline(world[1]["model"]).unet
    cut = slice_model(dense, PruneResult.load(run / "methods" / "norm", dense).architectures[0])
    refitted = load_model(model / "unet")
    changed = {
        name
        for (name, ours), theirs in zip(refitted.named_parameters(), cut.parameters(), strict=True)
        if not torch.equal(ours, theirs)
    }
    assert changed and all(name.rpartition(".")[0] in {fit["path"] for fit in fits} for name in changed)
    row = next(row for row in json.loads((run / "results.json").read_text())["table"]["rows"] if row["name"] == "norm")
    assert row["training_passes"] > len(fits) * REFIT["samples"]


@pytest.mark.long
def test_a_killed_run_keeps_its_refit(world, monkeypatch):
    recipe = write(world, "killed", recover={"closed_form": REFIT})
    refit, fine_tune = recovering.refit, recovering.fine_tune

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(recovering, "fine_tune", killed)
    with pytest.raises(KeyboardInterrupt):
        start(recipe, (), world[0] / "killed")
    monkeypatch.setattr(recovering, "fine_tune", fine_tune)
    monkeypatch.setattr(recovering, "refit", killed)  # the refit is not repeated
    run = start(recipe, (), world[0] / "killed")
    monkeypatch.setattr(recovering, "refit", refit)
    whole = start(write(world, "whole", recover={"closed_form": REFIT}), (), world[0] / "whole")
    models = [load_model(folder / "methods" / "norm" / "experts" / "0" / "unet") for folder in (run, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
    assert figures_of(run)["steps"] == 2


def test_low_rank_fine_tuning_is_a_run(world):
    pytest.importorskip("peft")
    recipe = write(world, "low_rank", fine_tune={"steps": 2, **TRAINING, "lora": {"rank": 2}})
    run = start(recipe, (), world[0] / "low_rank")
    names = list(load_model(run / "methods" / "norm" / "experts" / "0" / "unet").state_dict())
    assert not any("lora" in name for name in names) and figures_of(run)["steps"] == 2


@pytest.mark.long
def test_a_plan_counts_the_refit(world):
    refit, tuned, low = (
        plan(load_recipe(write(world, f"plan-{name}", **changes)), Devices(throughput=1e12))
        for name, changes in (
            ("refit", {"recover": {"closed_form": REFIT, "fine_tune": False}}),
            ("tuned", {}),
            ("low", {"fine_tune": {"steps": 2, **TRAINING, "lora": {"rank": 2}}}),
        )
    )
    assert "norm: closed-form refit" in {row["stage"] for row in refit["work"]}
    assert "norm: fine-tuning" not in {row["stage"] for row in refit["work"]}
    assert set(refit["memory"]["peak"]) >= {"closed-form refit"} and "fine-tuning" not in refit["memory"]["peak"]
    assert low["memory"]["peak"]["fine-tuning"] < tuned["memory"]["peak"]["fine-tuning"]
    assert low["seconds"] < tuned["seconds"]


def test_models_that_share_their_weights_are_not_refitted(world):
    methods = {"one_mask": {"experts": 1, "bins": 2, "choice": "norm"}}
    recipe = write(world, "shared", recover={"closed_form": REFIT}, methods=methods)
    with pytest.raises(UserError, match=r"recover\.closed_form with fine_tune\.shared_backbone=true"):
        load_recipe(recipe)
    methods["one_mask"]["bins"] = 1  # a single model
    assert load_recipe(write(world, "alone", recover={"closed_form": REFIT}, methods=methods)).recover.closed_form
