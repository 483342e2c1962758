"""The documentation builds without warnings and agrees with the schema, and the files beside it are well formed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_recipe_reference_is_the_schemas():
    reference = module(DOCS / "recipe_reference.py")
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run python docs/recipe_reference.py"


def test_every_setting_is_described():
    page = (DOCS / "recipe_reference.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 150 and not [row for row in rows if row.endswith("|  |")]
    links = set(re.findall(r"\]\(#(\w+)\)", page))
    assert links <= {heading.lower() for heading in re.findall(r"^### (\w+)$", page, re.MULTILINE)}


def test_the_pictures_are_drawn_from_the_code():
    """Numbers of units match the models' shapes. The picture of packages changes with imports, so it is only drawn."""
    pictures = module(DOCS / "pictures.py")
    for name, draw in pictures.PICTURES.items():
        drawn, kept = draw(), (pictures.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
        assert name == "architecture" or drawn == kept, "run python docs/pictures.py"
        assert "prefers-color-scheme: dark" in kept and "<title>" in kept
    assert {path.stem for path in pictures.FOLDER.glob("*.svg")} == set(pictures.PICTURES)


def test_every_page_says_what_its_reader_gets():
    """The first sentence says it, except on the front page and in records of results."""
    for page in DOCS.glob("*.md"):
        if page.stem != "index":
            first = page.read_text(encoding="utf-8").split("\n\n")[1]
            assert first.startswith("At the end of this page"), page.name


@pytest.mark.skipif(not importlib.util.find_spec("furo"), reason="sphinx, furo and myst-parser are not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = [path for path in DOCS.rglob("*.md") if path.name != "table.md"]
    assert len(pages) > 20
    for page in pages:
        built = (tmp_path / page.relative_to(DOCS)).with_suffix(".html")
        assert built.is_file() and '<script src="https' not in built.read_text(encoding="utf-8")
    assert "<math" in (tmp_path / "how_aptp_works.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_the_site(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", (ROOT / page).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("name", ["CITATION.cff", ".pre-commit-config.yaml"])
def test_files_for_tools_are_well_formed(name):
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    if name == "CITATION.cff":
        assert {"cff-version", "title", "message", "authors"} <= set(content)
        version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
        assert str(content["version"]) == version
    else:
        assert all(repo["hooks"] for repo in content["repos"])
