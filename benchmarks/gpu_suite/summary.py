"""Summarize a call: one line per step, and whether every step finished with results that are equal to the CPU's."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu_suite.record import Row, table
from prunekit.runtime.files import read_json, write_text

RESUME, FAILED = 75, 1  # exit statuses. RESUME: start the same command again. FAILED: a result differs, or an error


def summarize(output: Path, steps: Sequence[str], statuses: Mapping[str, int]) -> int:
    """Write `summary.md`, print it, and return the exit status of the call.

    1: a piece failed, an error exceeds its tolerance, a step compared nothing, or a step's process ended with a status
    other than 0 and 75. 75: pieces are missing; start the same command again to resume. 0: all pieces of all steps
    finished, and each step compared something.
    """
    rows = [summary_of(output / f"{step}.json", step, statuses[step]) for step in steps]
    text = table(rows)
    write_text(output / "summary.md", f"# GPU suite\n\n{text}")
    print(text)
    verdicts = {row["verdict"].partition(":")[0] for row in rows}
    return FAILED if "failed" in verdicts else RESUME if "unfinished" in verdicts else 0


def summary_of(path: Path, step: str, status: int) -> Row:
    """Return a step's line of the summary. status: exit status of the step's process."""
    content = read_json(path) if path.is_file() else {"pieces": {}, "missing": ["everything"]}
    pieces, missing = content["pieces"], content["missing"]
    compared = [one for piece in pieces.values() for one in piece["comparisons"]]
    wrong = [f"{one['what']} is off by {one['error']:.1e}" for one in compared if not one["holds"]]
    failed = [f"{name}: {piece['left_out'][0]}" for name, piece in pieces.items() if piece["state"] == "failed"]
    made = sum(piece["state"] == "made" for piece in pieces.values())
    line = {"step": step, "pieces": f"{made} of {made + len(missing)}", "compared": len(compared)}
    line["seconds"] = round(sum(piece["seconds"] for piece in pieces.values()))
    if status not in (0, RESUME):
        verdict = f"failed: its process ended with status {status}"
    elif failed or wrong:
        verdict = f"failed: {(failed + wrong)[0]}"
    elif missing:
        verdict = "unfinished: start the same command again"
    else:
        verdict = "whole" if compared else "failed: nothing was compared with the CPU"
    return {**line, "verdict": verdict}
