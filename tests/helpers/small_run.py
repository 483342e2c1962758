"""A small run: its recipe, its figures, and checks of a finished run or comparison."""

import json
from pathlib import Path

import yaml
from small_model import TRAINING, write_world

from prunekit.jobs.recipe import load_recipe
from prunekit.models import EMBEDDED
from prunekit.report.trust import TOLERANCES

STEPWISE = {**TRAINING, "checkpoint_minutes": 1e-9, "log_every": 1}
RESULTS = ("methods/norm/result.json", "methods/aptp/result.json", "results.json")


def write_small_recipe(folder):
    """Write the model, the data and a recipe with every stage and a checkpoint after each step; return its path."""
    content = {
        **write_world(folder),
        "prune": {"budget": 0.7},
        "methods": {"norm": {"samples": 2}, "aptp": {"experts": 2, "warmup": 2, "search": {"steps": 6, **STEPWISE}}},
        "fine_tune": {"steps": 5, **STEPWISE},
        "evaluation": {"num_images": 6, "steps": 2, "batch_size": 2, "num_predictions": 8, "num_pictures": 2},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def figures(directory):
    """Return all results of a run and the figures of its trainings, without the times, which differ between runs."""
    content = [json.loads((directory / name).read_text()) for name in RESULTS]
    for result in content[:2]:
        result["info"].get("search", {}).pop("seconds", None)
    trained = {path.parent: json.loads(path.read_text()) for path in directory.glob("methods/*/experts/*/figures.json")}
    assert trained
    content.append({str(f.relative_to(directory)): {**own, "seconds": 0} for f, own in sorted(trained.items())})
    for table in (content[2]["table"], *content[2]["experts"].values()):
        for row in table["rows"]:
            row.pop("seconds_per_image", None)
            row.pop("training_seconds", None)
    return content


def check_table(directory: Path) -> None:
    """Check that a finished run or comparison has every row of its recipe, each within its budget."""
    content = json.loads((directory / "results.json").read_text())
    assert (directory / "table.md").is_file() and not content.get("missing")
    for path in (directory / "metrics").glob("*.certificate.json"):
        certificate = json.loads(path.read_text())
        assert max(certificate["errors"]) <= TOLERANCES[certificate["dtype"]]
        assert certificate["predicted"] == certificate["counted"]
    if (directory / "cells").is_dir() or not (directory / "recipe.yaml").is_file():  # a comparison, or several runs
        return
    recipe = load_recipe(directory / "recipe.yaml")
    rows = {row["name"]: row for row in content["table"]["rows"]}
    at_steps = recipe.evaluation.at_steps
    names = {name for method in recipe.methods for name in (method, *(f"{method}@{step}" for step in at_steps))}
    assert set(rows) == {"dense", *names}
    if recipe.prune.latency is None:
        assert all(rows[name]["macs_ratio"] <= recipe.prune.budget for name in names)
        if recipe.model == EMBEDDED:  # one of its units is a small part of the budget
            assert all(rows[name]["macs_ratio"] > recipe.prune.budget - 0.05 for name in names)
