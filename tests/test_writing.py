"""No page, recipe, string or docstring contains a phrase that docs/writing.md replaces."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "writing.md"
MORE = {  # patterns that the guide's table cannot express as phrases
    r"(?<![Tt]here )\bis no (?!more |longer |slower |larger |smaller )(?=\w)": "is not a",
    r"\d \w+ an? (?:expert|step|row|picture|epoch|page)\b": "per expert, per step",
    r"\b\w*(?:olour|ehaviour)\w*\b": "American spelling",
    r"\bcentre[sd]?\b|\bgrey\b|\blicence\b": "American spelling",
    r"\b(?:minim|optim|maxim|normal|quant|general|special|initial)is(?:e|es|ed|ing|ation)\b": "American spelling",
}
NAMES = {"normalised"}  # values of settings; they keep their spelling


def phrases() -> list[re.Pattern[str]]:
    """Return patterns of the phrases in code font in the left column of the guide's table, and of MORE."""
    table = GUIDE.read_text(encoding="utf-8").split("## Before and after")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    fixed = [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]
    assert len(fixed) > 20
    return [re.compile(rf"\b{re.escape(phrase)}\b") for phrase in fixed] + [re.compile(pattern) for pattern in MORE]


def texts() -> Iterator[tuple[str, str]]:
    """Yield (place, text) for all texts that people read."""
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        if page != GUIDE and page.name != "table.md" and "_build" not in page.parts:
            yield page.relative_to(ROOT).as_posix(), re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        comments = re.findall(r"(?:^|\s)#(.*)$", recipe.read_text(encoding="utf-8"), re.MULTILINE)
        yield recipe.relative_to(ROOT).as_posix(), "\n".join(comments)
    for module in (ROOT / "prunekit").rglob("*.py"):
        found: list[str] = []
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                found.append(node.value)
        yield module.relative_to(ROOT).as_posix(), "\n".join(found)


def test_no_text_has_a_phrase_that_the_guide_replaces():
    patterns = phrases()
    together = re.compile("|".join(f"(?:{pattern.pattern})" for pattern in patterns))
    found = []
    for place, text in texts():
        plain = " ".join(text.split())
        for match in together.finditer(plain):
            if match[0] not in NAMES:
                found.append(f"{place}: …{plain[max(0, match.start() - 40) : match.end() + 40]}…")
    assert not found, "docs/writing.md has other words for:\n" + "\n".join(found)


def test_the_guide_is_linked_for_contributors():
    assert "docs/writing.md" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_setting_is_a_sentence():
    """A description starts with a capital letter or with a setting's value and a colon, and ends with a period."""
    page = (ROOT / "docs" / "recipe_reference.md").read_text(encoding="utf-8")
    described = [line.split(" | ")[-1].removesuffix(" |") for line in page.splitlines() if line.startswith("| `")]
    assert len(described) > 150
    wrong = [text for text in described if not re.match(r"[A-Z(]|[\w, ]+: ", text) or not text.endswith(".")]
    assert not wrong, wrong
