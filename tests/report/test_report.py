"""The report page: every section in one file, also for a run without routing, an old run, and a comparison."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from browsers import need_browser, open_page
from small_model import TRAINING, write_world

from prunekit.jobs.compare.comparing import compare
from prunekit.jobs.reporting import finish, report
from prunekit.jobs.run import start
from prunekit.report import REPORT, write_report
from prunekit.report.comparison_table import rows_of, verdict
from prunekit.report.page import MOST_BYTES, SECTIONS
from prunekit.report.routing_map import MOST_POINTS, mapped_rows, prompt_map
from prunekit.report.source import Source
from prunekit.report.training_curves import by_training, step_times, thinned
from prunekit.report.trust import warnings_of

WRITES_REPORTS = True
RECORDED = Path(__file__).parents[2] / "docs" / "results"
FEW_CELLS = {  # cells of compare_emoji at seed 0 and one budget
    "dense__seed0__static",
    "aptp__0.5__seed0__static",
    *(
        f"{label}__0.5__seed0__{protocol}"
        for label in ("aptp-shared", "norm", "random", "taylor_sp", "uniarch")
        for protocol in ("equal_steps", "equal_total")
    ),
}
VOID = {"meta", "link", "img", "input", "br"}
FREE = {"p", "li", "td", "th", "tr", "thead", "tbody", "dt", "dd"}  # elements whose end tag HTML allows to omit


class Page(HTMLParser):
    """A parsed page: its links, ids and number of pictures; it checks that elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.open, self.pictures = [], [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.links += [given[name] for name in ("src", "href", "xlink:href", "srcset") if given.get(name)]
        self.ids += [given["id"]] if "id" in given else []
        self.pictures += tag in ("svg", "img")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


def read(directory):
    """Check a directory's page for the properties of all pages, and return it as text and parsed."""
    path = directory / REPORT
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path.stat().st_size < MOST_BYTES and not page.open
    assert len(page.ids) == len(set(page.ids)) and set(SECTIONS) <= set(page.ids)
    for link in page.links:  # the page needs no other file
        assert link.startswith("data:") or link.removeprefix("#") in page.ids, link[:80]
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    without = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert without.count("<script") == 0 and len(without) > 0.9 * len(
        text
    )  # without scripts, only the filter and the enlarging of pictures are missing
    return text, page


def reasons(text):
    return [re.sub(r"<[^>]*>", "", line) for line in re.findall(r'class="left-out">(.*?)</p>', text)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, write_world(folder)


def write(folder, name, content):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    folder, settings = world
    search = {"steps": 4, **TRAINING, "log_every": 1}
    content = {
        **settings,
        "prune": {"budget": 0.7},
        "methods": {"norm": {"samples": 2}, "aptp": {"experts": 2, "warmup": 2, "search": search}},
        "fine_tune": {"steps": 3, **TRAINING, "log_every": 1},
        "evaluation": {"num_images": 6, "steps": 2, "batch_size": 3, "num_predictions": 8, "num_pictures": 2},
    }
    directory = tmp_path_factory.mktemp("runs") / "routed"
    start(write(folder, "routed", content), (), directory)
    report([directory], True, lambda text: None)
    return directory


def test_every_section_of_a_run(run):
    text, page = read(run)
    assert reasons(text) == []
    assert len(re.findall(r"<article", text)) == 6 and text.count('<img src="data:image/png') == 18
    assert "expert 0 · " in text and "expert 1: " in text
    for shown in ("CMMD", "± ", "against exact MACs", "with transport", "principal component", "time step t"):
        assert shown in text, shown
    for shown in ("aptp search", "distillation", "Memory", "GiB", "✓ passes", "✓ equal", "torch"):
        assert shown in text, shown
    assert "✗" not in text and page.pictures > 30
    rows = json.loads((run / "results.json").read_text())["table"]["rows"]
    errors = json.loads((run / "metrics" / "aptp.errors.json").read_text())
    half = 1.96 * errors["cmmd"]
    assert f"{rows[2]['cmmd']:.3f} ± {half:.3f}" in re.sub(r"</?small>", "", text)


def test_what_is_recorded_fits_the_run(run):
    found = json.loads((run / "metrics" / "aptp.certificate.json").read_text())
    assert found["predicted"] == found["counted"] and max(found["errors"]) < 1e-5
    info = json.loads((run / "methods" / "aptp" / "result.json").read_text())["info"]
    for own in info["assignment"].values():
        assert sum(own) == sum(info["prompts_per_expert"])
    places = json.loads((run / "metrics" / "aptp.map.json").read_text())
    assert [places["experts"].count(e) for e in range(2)] == info["prompts_per_expert"]
    damage = json.loads((run / "sensitivity.json").read_text())["damage"]
    assert "mid_block.resnets.0" in damage and all(value >= 0 for own in damage.values() for value in own)


def test_it_fits_screens_and_paper(run):
    need_browser()
    wide = "[...document.querySelectorAll('table, figure')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    with open_page() as (page, faults, asked):
        page.goto((run / REPORT).as_uri())
        assert page.evaluate(f"{wide}.map(e => e.innerText)") == []
        page.fill(".filter input", "red")
        count = page.locator(".map path:not(.hidden)").count()
        assert 0 < count < page.locator(".map path").count() and f"{count} prompts" in page.inner_text("output")
        page.locator("#wall .zoom").first.click()
        assert page.locator("dialog img").bounding_box()["width"] > 700
        page.keyboard.press("Escape")
        page.locator("#headline .zoom").first.press("Enter")
        assert page.locator("dialog svg").bounding_box()["width"] > 700 and not page.locator("dialog img").count()
        page.locator("dialog").click()
        assert not page.evaluate("document.querySelector('dialog').open")
        page.set_viewport_size({"width": 390, "height": 900})  # tables scroll horizontally, but the page does not
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.set_viewport_size({"width": 1040, "height": 700})  # A4 landscape
        page.emulate_media(media="print")
        assert page.evaluate(f"{wide}.map(e => e.innerText)") == []
    assert faults == [] and [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_it_is_the_same_again_and_runs_no_model(run, monkeypatch):
    before = (run / REPORT).read_text()
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    write_report(run)
    numbers = re.compile(r"\bf\d+-")
    assert numbers.sub("", (run / REPORT).read_text()) == numbers.sub("", before)


def test_an_old_run_says_what_it_lacks(run, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(run, old)
    shutil.rmtree(old / "samples")
    for path in [old / "environment.json", old / "sensitivity.json", *(old / "metrics").glob("*.map.json")]:
        path.unlink()
    for path in [*(old / "metrics").glob("*.errors.json"), *(old / "metrics").glob("*.certificate.json")]:
        path.unlink()
    (old / "log.jsonl").write_text('{"event": "cut o')
    settings = yaml.safe_load((old / "recipe.yaml").read_text())
    (old / "recipe.yaml").write_text(yaml.safe_dump({**settings, "model": str(tmp_path / "gone")}))
    write_report(old)
    text, _ = read(old)
    left = " | ".join(reasons(text))
    for part in ("no pictures", "cannot be read here", "--sensitivity", "No map", "no log of a training"):
        assert part in left, part
    assert "±" not in re.sub(r"<p.*?</p>", "", text) and "recorded no intervals" in text


def test_a_run_without_routing(run, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(run, plain)
    results = json.loads((plain / "results.json").read_text())
    results["table"]["rows"] = results["table"]["rows"][:2]
    (plain / "results.json").write_text(json.dumps({**results, "experts": {}, "routing": {}}))
    settings = yaml.safe_load((plain / "recipe.yaml").read_text())
    (plain / "recipe.yaml").write_text(yaml.safe_dump({**settings, "methods": {"norm": {"samples": 2}}}))
    write_report(plain)
    text, _ = read(plain)
    assert [line for line in reasons(text) if "routes prompts" in line] and len(reasons(text)) == 1
    assert "expert 1" not in text


def test_a_comparison(world, tmp_path):
    folder, settings = world
    content = {
        "job": "compare",
        **settings,
        "budgets": [{"budget": 0.7, "seeds": [0]}],
        "methods": {"random": {}},
        "fine_tune": {"steps": 2, **TRAINING},
        "evaluation": {"num_images": 4, "steps": 1, "batch_size": 4, "num_predictions": 4},
    }
    compare([write(folder, "compared", content)], (), tmp_path / "compared")
    text, _ = read(tmp_path / "compared")
    assert "Budget 0.7, equal steps" in text and text.count("<article") == 4 and "random, " in text
    assert len(reasons(text)) == 2 + ("Memory was not" in text), reasons(text)  # no routing and no sensitivity


@pytest.fixture
def recorded(tmp_path):
    """Return a directory with finished cells of two recipes, and the recipe of one of them."""
    folder = tmp_path / "recorded"
    shutil.copytree(RECORDED / "compare_emoji" / "cells", folder / "cells")
    budgets = [{"budget": 0.5, "seeds": [0, 1], "methods": ["norm", "uniarch", "random"]}]
    rows = {name: {} for name in ("norm", "uniarch", "random", "aptp")}
    write(folder, "recipe", {"job": "compare", "name": "mine", "budgets": budgets, "methods": rows})
    for path in sorted((folder / "cells").glob("*.json")):
        if path.stem not in FEW_CELLS:
            path.unlink()
            continue
        cell = json.loads(path.read_text())
        if cell["cell"]["method"] in ("norm", "uniarch"):  # the cells of "random" are shared with another recipe
            path.write_text(json.dumps({**cell, "recipe": "mine"}))
    return folder


def test_a_comparison_shows_the_cells_of_its_recipe(recorded):
    shown = {cell["cell"]["method"] for cell in Source(recorded).cells}
    assert shown == {"dense", "norm", "uniarch", "random"}
    theirs = next((recorded / "cells").glob("norm__*equal_steps.json"))
    mine = theirs.with_name(f"{theirs.stem}__mine.json")
    content = json.loads(theirs.read_text())
    mine.write_text(json.dumps({**content, "figures": {**content["figures"], "agreement": 0.5}}))
    theirs.write_text(json.dumps({**content, "recipe": "theirs"}))
    norm = [
        cell for cell in Source(recorded).cells if (cell["cell"]["method"], cell["steps"]) == ("norm", content["steps"])
    ]
    assert [cell["figures"]["agreement"] for cell in norm] == [0.5]
    (recorded / "results.json").write_text(json.dumps({"missing": ["random__0.5__seed0__equal_steps"]}))
    rows = [(cell["cell"]["method"], cell["cell"]["protocol"]) for cell in Source(recorded).cells]
    assert ("random", "equal_total") in rows and ("random", "equal_steps") not in rows
    write(
        recorded,
        "recipe-theirs",
        {"job": "compare", "name": "theirs", "budgets": [{"budget": 0.5}], "methods": {"aptp": {}}},
    )
    (recorded / "results.json").write_text(json.dumps({"recipes": ["theirs"]}))
    assert {cell["cell"]["method"] for cell in Source(recorded).cells} == {"dense", "aptp"}


def test_a_comparison_logs_only_its_trainings(recorded):
    lines = [{"stage": f"{name} 0.5 seed 0 equal_steps 0", "step": 1} for name in ("norm", "aptp")]
    (recorded / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*lines, {"event": "said"}]))
    assert [row.get("stage", row.get("event")) for row in Source(recorded).log] == [lines[0]["stage"], "said"]


def cells_of(name):
    """Return the cells of a recorded comparison."""
    return [json.loads(path.read_text()) for path in sorted((RECORDED / name / "cells").glob("*.json"))]


@pytest.mark.parametrize(
    ("name", "budget", "expected"),
    [
        (
            "compare_emoji_captions",
            "0.5",
            "aptp has the lowest agreement MSE, 0.0433; the next is uniarch, 0.0570, a diff",
        ),
        (
            "compare_emoji_base",
            "bksdm:base",
            "does not separate it from uniarch, taylor_sp, random; 3 of the other rows",
        ),
        ("compare_emoji_base", "bksdm:2,1,1,1", "with one seed and no recorded errors, the noise is unknown."),
        ("compare_emoji", "0.5", "does not separate it from aptp, aptp-random-partition; 4 of the other rows"),
    ],
)
def test_the_verdict_of_a_comparison(name, budget, expected):
    cells = cells_of(name)
    sentence = verdict(rows_of([cell for cell in cells if cell["cell"]["budget"] in ("", budget)]))
    assert sentence.startswith(f"At budget {budget}, ") and expected in sentence
    dense = [cell for cell in cells if cell["cell"]["method"] == "dense"]
    assert verdict(rows_of(dense)) == ""


@pytest.mark.parametrize("name", ["compare_emoji", "compare_emoji_captions", "ablation_emoji"])
def test_the_tables_of_a_comparison_fit_a_wide_screen(name, tmp_path):
    need_browser()
    shutil.copytree(RECORDED / name / "cells", tmp_path / "cells")
    with open_page() as (page, faults, _asked):
        page.goto(write_report(tmp_path).as_uri())
        boxes = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
        assert page.evaluate(f"{boxes}.length") == 0
    assert faults == []


def test_a_collapsed_mixture_is_among_the_warnings(run, tmp_path):
    shutil.copytree(run, tmp_path / "collapsed")
    path = tmp_path / "collapsed" / "methods" / "aptp" / "result.json"
    content = json.loads(path.read_text())
    content["info"]["prompts_per_expert"] = [9, 0]
    content["architectures"][1] = content["architectures"][0]
    path.write_text(json.dumps(content))
    lines = [
        "experts 0, 1 of 2 have the same architecture",
        "expert 1 of 2 gets no training prompts and is not fine-tuned",
        "expert 0 of 2 gets 100.0 % of the training prompts, so the mixture is nearly one architecture",
    ]
    assert {f"aptp: {line}." for line in lines} <= set(warnings_of(Source(tmp_path / "collapsed")))
    cell = {"cell": {"method": "aptp", "budget": "0.5", "seed": 0, "protocol": "equal_steps"}, "warnings": lines}
    (tmp_path / "compared" / "cells").mkdir(parents=True)
    (tmp_path / "compared" / "cells" / "aptp.json").write_text(json.dumps({**cell, "experts": []}))
    assert warnings_of(Source(tmp_path / "compared"))[:3] == [f"aptp 0.5 seed 0: {line}." for line in lines]


def test_no_run_is_one_line(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"is (neither a run|not a directory)") as error:
            write_report(place)
        assert "\n" not in str(error.value)
    said = []
    finish(tmp_path, said.append)
    assert len(said) == 1 and said[0].startswith(f"no report ({tmp_path} is neither a run")


def test_curves():
    log = [{"stage": "a", "step": step, "loss": 1.0 * step, "seconds": 2.0 * step, "rate": 1} for step in (1, 2, 4)]
    log += [{"event": "x"}, {"stage": "a", "step": 2, "loss": 9.0, "seconds": 4.0, "rate": 1}]
    rows = by_training(log)["a"]
    assert [row["loss"] for row in rows] == [1.0, 9.0, 4.0]
    assert [row["time"] for row in step_times(rows)] == [2, 2, 2]
    assert thinned(list(range(1000)), 10)[-1] == 999 and len(thinned(list(range(1000)), 10)) <= 11


def test_a_map_is_the_plane_of_greatest_spread():
    import torch

    points = torch.zeros(50, 5)
    points[:, 3], points[:, 1] = torch.linspace(-9, 9, 50), torch.linspace(-1, 1, 50).square()
    found = prompt_map(points, [str(i) for i in range(50)], torch.zeros(50, dtype=torch.long), 70)
    assert found["variance"][0] > 0.99 and abs(sum(found["variance"]) - 1) < 1e-4
    assert found["places"][0][0] == pytest.approx(-9, abs=1e-3) and found["of"] == 70
    rows = mapped_rows(5000, seed=1).tolist()
    assert len(rows) == MOST_POINTS and rows == sorted(set(rows)) and mapped_rows(9).tolist() == [*range(9)]
