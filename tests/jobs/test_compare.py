"""Small comparisons: cells, their cache, both protocols, the refusal of unfair tables."""

import copy
import csv
import json
import shutil

import pytest
import yaml
from small_model import TRAINING, write_world

from prunekit.jobs.compare.cell_runner import key_of
from prunekit.jobs.compare.comparing import Comparison, compare
from prunekit.jobs.compare.fairness import refuse_unfair
from prunekit.jobs.recipe import RecipeError, load_recipe
from prunekit.jobs.recipe.earlier import ADDED
from prunekit.jobs.run import start
from prunekit.report.comparison_table import Cell, best, rows_of, shown_rows, warnings_of
from prunekit.report.source import Source
from prunekit.report.wall import wall
from prunekit.runtime.run_directory import DENSE
from prunekit.runtime.work import claimed

BASE = "bksdm:base"
COMPARED = ("equal_total", BASE)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    content = {
        "job": "compare",
        **write_world(folder, layers=2),  # BK-SDM needs 2 layers
        "budgets": [
            {"budget": BASE, "seeds": [0, 1], "methods": ["norm"]},
            {"budget": BASE, "methods": ["aptp", "plain", "bksdm"]},
            {"budget": 0.8, "methods": ["norm", "plain"]},
        ],
        "methods": {
            "norm": {"samples": 4},
            "plain": {"method": "norm", "samples": 4, "distillation": False},
            "bksdm": {},
            "aptp": {"experts": 2, "warmup": 1, "search": {"steps": 3, **TRAINING}},
        },
        "fine_tune": {"steps": 4, **TRAINING},
        "evaluation": {"num_images": 4, "steps": 1, "batch_size": 4, "num_predictions": 4},
        "published": [{"row": "norm", "FID": 141.04}],
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    held = folder / "work" / "locks" / f"{Cell('norm', BASE, 0).choice}.lock"
    with claimed(held) as mine:  # as if another process computed it
        assert mine
        compare([recipe], (), folder)
    assert json.loads((folder / "results.json").read_text())["missing"] == [Cell("norm", BASE, 0).name]
    assert "Missing cells (1)" in (folder / "table.md").read_text()
    assert compare([recipe], (), folder) == folder
    return folder


def read(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))]


def test_every_cell_once(recipe, finished):
    names = {path.stem for path in (finished / "cells").glob("*.json")}
    assert names == {cell.name for cell in Comparison(load_recipe(recipe), finished).cells}
    # The dense model; per budget, the row with the most compute (norm, because of its calibration);
    # the other rows, which train longer to match it.
    assert len(names) == 2 + (2 + 1) + 2 * (1 + 1 + 1 + 1)
    content = json.loads((finished / "results.json").read_text())
    assert content["missing"] == [] and content["published"] == [{"row": "norm", "FID": 141.04}]
    assert (finished / "pareto.png").stat().st_size > 10_000
    assert (finished / "comparison.png").stat().st_size > 10_000


def test_the_wall_shows_pictures_of_held_out_prompts(finished):
    (request,) = finished.glob("work/norm__bksdm-base__seed0__static-samples-*[0-9a-f]/request.json")
    drawn = json.loads(request.read_text())["prompts"]
    cards = wall(Source(finished)).content["cards"]
    assert cards and {card["prompt"] for card in cards} <= set(drawn)


def test_a_depth_only_expert_is_a_stock_unet(finished):
    def saved(label, protocol):
        (path,) = finished.glob(f"work/{label}__bksdm-base__seed0__{protocol}-models-*/0/unet/config.json")
        return json.loads(path.read_text())

    member, norm = saved("bksdm", "equal_total"), saved("norm", "static")
    assert member["_class_name"] == "UNet2DConditionModel" and "pruning" not in member
    assert norm["_class_name"] == "PrunedUNet2DConditionModel" and norm["pruning"]["kept"]


def test_rows_of_both_protocols(finished):
    rows = rows_of(read(finished))
    table = {(row.protocol, row.budget, row.method): row for row in rows}
    steps, total = table["equal_steps", BASE, "aptp"], table["equal_total", BASE, "aptp"]
    assert (steps.models, steps.steps) == (2, 4) and total.steps > 4
    assert table["equal_steps", BASE, "norm"].estimates == table["equal_total", BASE, "norm"].estimates
    computed = {row.method: row.costs["training_passes"] for row in rows if (row.protocol, row.budget) == COMPARED}
    step = 4 * 4 * TRAINING["batch_size"]  # a step of at most four models; forward, backward and teacher count 4
    assert all(
        computed["norm"] - step < passes < computed["norm"] + step for name, passes in computed.items() if passes
    )
    assert table["equal_steps", BASE, "plain"].distillation == "none"
    assert table["equal_steps", BASE, "norm"].distillation == "shared"
    assert table["equal_steps", BASE, "norm"].seeds == (
        0,
        1,
    )
    member = table["equal_steps", BASE, "bksdm"].costs["macs"]
    for row in rows:
        if row.method != DENSE and row.budget == BASE:
            assert row.costs["macs"] <= member + 1 and row.costs["macs"] > 0.97 * member, row.method
    assert table["equal_steps", "0.8", "norm"].seeds == (0,)


def test_the_table_marks_the_best_and_what_cannot_be_told_apart(finished):
    rows = [row for row in rows_of(read(finished)) if (row.protocol, row.budget) == ("equal_steps", BASE)]
    lines, columns = shown_rows(rows)
    top = best(rows, "cmmd").method
    assert [line["name"] for line in lines if line["cmmd"].startswith("**")] == [top]
    assert {"cmmd", "kid", "agreement"} <= {column.key for column in columns}
    assert "clip_score" not in {column.key for column in columns}, "the evaluator cannot judge it here"
    text = (finished / "table.md").read_text()
    assert text.count("## Budget") == 4 and "## As published" in text and "141.04" in text
    with (finished / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows_of(read(finished))) and float(lines[0]["cmmd_low"]) <= float(lines[0]["cmmd_mean"])


def test_what_may_be_wrong_stands_under_the_tables(finished):
    cells = read(finished)
    warnings = json.loads((finished / "results.json").read_text())["warnings"]
    assert warnings and warnings == warnings_of(cells)
    (cell,) = [c for c in cells if (c["cell"]["method"], c["cell"]["seed"]) == ("aptp", 0) and c["steps"] == 4]
    for line in cell["warnings"]:
        assert f"- aptp {BASE} seed 0: {line}.\n" in (finished / "table.md").read_text()
    for other in cells:
        assert other["warnings"] or other["cell"]["method"] != "aptp"  # gates do not close within three steps


def test_an_earlier_collapsed_cell_says_so_and_counts_the_expert_that_is_used(finished):
    (cell,) = [c for c in read(finished) if (c["cell"]["method"], c["cell"]["seed"]) == ("aptp", 0) and c["steps"] == 4]
    del cell["warnings"]
    for expert, share in zip(cell["experts"], (1.0, 0.0), strict=True):
        expert["training_share"] = share
    assert warnings_of([cell]) == [
        f"aptp {BASE} seed 0: expert 1 of 2 gets no training prompts and is not fine-tuned",
        f"aptp {BASE} seed 0: expert 0 of 2 gets 100.0 % of the training prompts, so the mixture is nearly one "
        "architecture",
    ]
    (row,) = rows_of([cell])
    assert row.costs["params"] == cell["experts"][0]["params"] < cell["figures"]["params"]


def test_finished_cells_are_not_made_again(recipe, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    compare([recipe], (), finished)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}


@pytest.mark.long
def test_another_evaluation_keeps_the_models(recipe, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*.safetensors")}
    compare([recipe], ["evaluation.guidance=1.5"], tmp_path / "copy")
    assert models == {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*.safetensors")}
    cell = json.loads((tmp_path / "copy" / "cells" / f"{Cell('norm', BASE, 0).name}.json").read_text())
    assert cell["fields"]["evaluation.guidance"] == 1.5


def test_finished_cells_are_enough_elsewhere(finished, tmp_path):
    (tmp_path / "cells").mkdir()
    for path in (finished / "cells").glob("*.json"):
        (tmp_path / "cells" / path.name).write_text(path.read_text())
    compare([tmp_path], (), tmp_path)
    assert (tmp_path / "table.md").read_text().count("## Budget") == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("evaluation.steps", 50),
        ("resolution", 512),
        ("prune.convention", "aptp"),
        ("prune.budget", 0.9),
        ("prune.depth", "all"),
        ("fine_tune.steps", 99),
        ("fine_tune.batch_size", 64),
        ("fine_tune.denoising_weight", 0.5),
        ("data.content", "other"),
        ("model", "other"),
    ],
)
def test_an_undeclared_difference_is_refused_by_name(finished, field, value):
    cells = read(finished)
    refuse_unfair(cells)
    changed = copy.deepcopy(cells)
    index = next(i for i, cell in enumerate(changed) if cell["cell"]["method"] == "norm")
    changed[index]["fields"][field] = value
    with pytest.raises(ValueError, match=f"cannot share a table: {field} is"):
        refuse_unfair(changed)


def test_an_earlier_cell_has_todays_key_and_stands_beside_todays(finished):
    cells = read(finished)
    for cell in cells:  # as if the cell did the same work as all earlier cells
        cell["fields"] |= {field: value for field, value in ADDED.items() if field in cell["fields"]}
        cell["key"] = key_of(cell["fields"])
    earlier = copy.deepcopy(cells)
    for cell in earlier:
        for field in ADDED:
            cell["fields"].pop(field, None)
        assert key_of(cell["fields"]) == cell["key"]  # recorded before the setting existed, and not computed again
    refuse_unfair(cells[:3] + earlier[3:])
    row = next(cell for cell in cells if cell["cell"]["method"] == "aptp")
    assert row["fields"]["fine_tune.snr_form"] == row["fields"]["method.snr_form"] == "velocity"
    changed = {**row["fields"], "method.snr_form": "published"}
    assert key_of(changed) != row["key"]
    other = next(cell for cell in earlier if cell["cell"]["method"] == "norm")
    row["fields"] |= {"fine_tune.snr_form": "published"}
    with pytest.raises(ValueError, match=r"fine_tune\.snr_form is"):
        refuse_unfair([row, other])


def test_bad_comparisons_are_refused(recipe, tmp_path):
    for override, message in (
        ("budgets=[{budget: 'bksdm:huge'}]", "huge"),
        ("budgets=[{budget: base}]", "bksdm:VARIANT"),
        ("prune.budget=0.7", "give budgets and seeds in `budgets`"),
        ("methods.plain.distillation=maybe", "valid boolean"),
        ("methods.norm.method=nrom", "did you mean 'norm'"),
        ("budgets=[{budget: 0.8, methods: [nrm]}]", "did you mean 'norm'"),
    ):
        with pytest.raises(ValueError, match=message):
            compare([recipe], [override], tmp_path / "refused")
    with pytest.raises(RecipeError, match="prunekit compare"):
        start(recipe, (), tmp_path / "run")
    with pytest.raises(RecipeError, match="holds no cells"):
        compare([tmp_path], ())
