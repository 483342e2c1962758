"""What the README and the docs show is real: commands parse, files exist, Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from prunekit.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list:
    return [
        pytest.param(body, id=f"{page.stem}-{index}")
        for page in PAGES
        for index, (kind, body) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if kind == language
    ]


def commands() -> list:
    found = []
    for block in blocks("sh"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["prunekit"]:
                found.append(pytest.param(words[1:], id=" ".join(words)))
    return found


@pytest.mark.parametrize("words", commands())
def test_every_command_parses(words):
    group = typer.main.get_command(app)
    command = group.commands[words[0]]
    context = command.make_context(words[0], list(words[1:]))
    recipe = context.params.get("recipe")
    assert recipe is None or (ROOT / recipe).is_file()


def test_the_readme_has_commands_and_names_them_all():
    shown = {param.values[0][0] for param in commands()}
    assert shown == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("block", blocks("sh"))
def test_every_make_target_exists(block):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", block, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block, capsys):
    exec(compile(block, "README", "exec"), {"__name__": "readme"})
    assert "of the MACs" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_recipes_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for recipe in re.findall(r"recipes/\w+\.yaml", text):
        assert (ROOT / recipe).is_file(), recipe
