"""Shipped recipes are listed, found by name, copied with the recipes they extend, and run from a wheel alone."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command_line import ok, refused
from small_model import write_pipeline

from prunekit.jobs.recipe import load_recipe
from prunekit.jobs.shipped import copy_recipe, find_recipe, shipped_recipes, summary

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
PRUNING = [name for name in NAMES if not name.startswith("bench_")]


def test_every_recipe_is_listed_with_one_line():
    text = ok("recipes")
    assert list(shipped_recipes()) == NAMES
    for name, path in shipped_recipes().items():
        assert f"{name}: " in text and 10 < len(summary(path)) < 150 and "\n" not in summary(path)


def test_a_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "recipes" / "quickstart.yaml"
    assert find_recipe("quickstart").samefile(shipped) and find_recipe("quickstart.yaml").samefile(shipped)
    assert load_recipe("quickstart") == load_recipe(shipped)
    Path("quickstart.yaml").write_text("name: mine\n")
    assert find_recipe("quickstart.yaml") == Path("quickstart.yaml")  # a file has precedence
    assert "did you mean 'quickstart'" in refused("run", "quikstart")
    assert "`prunekit recipes` lists" in refused("check", "nothing/like/it.yaml")
    assert "did you mean 'quickstart.yaml'" in refused("plan", "quickstar.yaml")


@pytest.mark.parametrize("name", PRUNING)
def test_a_copy_with_what_it_extends_is_the_same_recipe(name, tmp_path):
    written = copy_recipe(name, tmp_path / "mine" / "own.yaml")
    assert written[0] == tmp_path / "mine" / "own.yaml" and load_recipe(written[0]) == load_recipe(name)


def test_copying_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "aptp_cc3m_base.yaml was written" in ok("recipes", "copy", "aptp_cc3m_base")
    assert (tmp_path / "base" / "paper_search.yaml").is_file()
    ok("recipes", "copy", "aptp_cc3m_base")  # copying the same content again succeeds
    (tmp_path / "base" / "sd21.yaml").write_text("model: emoji\n")
    before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("*.yaml"))
    assert "base/sd21.yaml exists with different content" in refused("recipes", "copy", "aptp_coco_base")
    assert sorted((path, path.read_bytes()) for path in tmp_path.rglob("*.yaml")) == before
    assert "did you mean 'quickstart'" in refused("recipes", "copy", "quickstrat")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the wheel, unpack it, and return its directory."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("prunekit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {f"prunekit/recipes/{name}.yaml" for name in NAMES} <= set(archive.namelist())
        archive.extractall(folder / "site")
    return folder / "site"


def run_installed(site: Path, place: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "prunekit", *words]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_its_recipes(installed, tmp_path):
    where = "import prunekit, prunekit.jobs.shipped as s; print(prunekit.__file__, s.find_recipe('quickstart'))"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    shown = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(installed)) for path in shown.stdout.split()), shown
    assert "quickstart: " in run_installed(installed, tmp_path, "recipes")


@pytest.mark.long
def test_the_wheel_runs_recipes_in_an_empty_directory(installed, tmp_path):
    """`check quickstart` and a small run of the smallest recipe need only the wheel's files."""
    model = write_pipeline(tmp_path / "model", layers=1)
    place = tmp_path / "empty"
    place.mkdir()
    assert "Every stage works" in run_installed(installed, place, "check", "quickstart", f"model={model}")
    printed = run_installed(installed, place, "run", "quickstart", "scale=smoke", f"model={model}")
    assert re.search(r"The run is in runs/quickstart_smoke", printed)
    assert (place / "runs" / "quickstart_smoke" / "table.md").is_file()
