"""Tables on a terminal fit its width, and show every cell completely."""

import re

import pytest
from rich.console import Console

from prunekit.runtime.screen import fitted_table, stdout_console, wrapped

HEADER = ["counter", "latent", "MACs", "exact MACs", "difference", "what explains it"]
NUMERIC = [False, True, True, True, True, False]
LINES = [
    ["prunekit, exact", "96 x 96", "1,074,552,872,960", "1,074,552,872,960", "0", "convolutions, QKᵀ and AV"],
    ["thop [conv]", "96 x 96", "988,111,222,333", "1,074,552,872,960", "-86,441,650,627", "omits QKᵀ and AV " * 4],
    ["down_blocks.0.attentions.0.transformer_blocks.0.attn1", "96 x 96", "1", "2", "-1", "–"],
]


def printed(width, lines=LINES, **options):
    console = Console(width=width, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(fitted_table(HEADER, lines, NUMERIC, width, **options))
    return capture.get()


@pytest.mark.parametrize("width", [60, 80, 160])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_table_fits_and_holds_every_cell(width, count):
    text = printed(width, LINES[:count], title="counters", strong_end=True)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert text.startswith("counters")
    for line in LINES[:count]:
        for cell, number in zip(line, NUMERIC, strict=True):
            words = [cell] if number else re.split(r"(?<=[._])|\s", cell)  # a text may wrap over several lines
            assert all(word in text for word in words)


@pytest.mark.parametrize(("width", "start"), [(160, "┃ counter"), (80, "┃ counter"), (50, "counter: prunekit, exact")])
def test_the_first_layout_that_fits_is_taken(width, start):
    """The layouts, in order: a line per row; a line per column, with row names in the header; a block per row."""
    text = printed(width, LINES[:2])
    assert sum(line.startswith(start) for line in text.splitlines()) == 1
    assert ("┃   prunekit, exact" in text) == (width == 80)
    assert text.count("exact MACs") == (2 if width == 50 else 1)


def test_words_are_broken_where_they_can_be_read():
    assert wrapped("down_blocks.0.attentions.0.attn1", 20) == "down_blocks.0.\nattentions.0.attn1"
    assert wrapped("a b c", 3) == "a b\nc"
    assert wrapped("x" * 7, 3) == "xxx\nxxx\nx"
    assert wrapped("", 3) == ""


def test_the_width_without_a_terminal(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert stdout_console().width == 160
    monkeypatch.setenv("COLUMNS", "72")
    assert stdout_console().width == 72


def test_a_table_without_rows_is_its_title():
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(fitted_table([], [], [], 80, "nothing yet"))
    assert capture.get() == "nothing yet\n"
