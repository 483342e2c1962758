"""Tables: one list of columns in three formats, without loss of figures."""

import json
import math

import pytest
from rich.console import Console

from prunekit.evaluation.table import (
    CEILING_COLUMNS,
    COLUMNS,
    EXPERT_COLUMNS,
    axis,
    json_table,
    markdown_table,
    shown,
    terminal_table,
)

ROWS = [
    {"name": "dense", "params": 3_214_567, "macs": 1_234_567_890, "macs_ratio": 1.0, "cmmd": 1.25, "top1": 0.8125},
    {"name": "a|b [bold]", "params": 1_000_000, "macs": 617_000_000, "macs_ratio": 0.4998, "cmmd": math.nan},
]


def test_markdown():
    assert markdown_table(ROWS) == (
        "| model | parameters (M) ↓ | MACs (G) ↓ | MACs (% of dense) ↓ | CMMD ↓ | top-1 (%) ↑ |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| dense | 3.21 | 1.235 | 100.0 | 1.250 | 81.2 |\n"
        "| a\\|b [bold] | 1.00 | 0.617 | 50.0 | – | – |\n"
    )


def test_json_keeps_full_precision():
    content = json.loads(json.dumps(json_table(ROWS), allow_nan=False))
    assert content["rows"][0] == ROWS[0]
    assert content["rows"][1]["cmmd"] is None and content["rows"][1]["macs"] == 617_000_000
    assert [column["key"] for column in content["columns"]] == list(ROWS[0])
    assert content["columns"][4]["direction"] == "↓"


def test_terminal():
    console = Console(width=160, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(terminal_table(ROWS, title="Results"))
    text = capture.get()
    assert "Results" in text and "a|b [bold]" in text and "81.2" in text and "MACs (G) ↓" in text


def test_a_key_without_column_is_refused():
    with pytest.raises(ValueError, match="did you mean 'frechet'"):
        markdown_table([{"name": "dense", "frechett": 1.0}])


def test_axes_are_columns():
    columns = [COLUMNS[0], axis("method"), axis("seed"), *COLUMNS[1:]]
    assert [c.header for c in shown([{"name": "x", "method": "norm", "seed": 3}], columns)] == [
        "model",
        "method",
        "seed",
    ]


def test_experts_and_ceiling():
    row = {"expert": 3, "params": 1, "macs": 2, "macs_ratio": 0.5, "training_share": 0.125, "prompts": 40}
    assert "| 3 | 0.00 | 0.000 | 50.0 | 12.5 | 40 |" in markdown_table([row], EXPERT_COLUMNS)
    assert "| real | 100.0 |" in markdown_table([{"name": "real", "top1": 1.0}], CEILING_COLUMNS)
