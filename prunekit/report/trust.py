"""Trust: whether cut models equal masked models and costs equal counted MACs; warnings, versions and hashes."""

from typing import Any

from prunekit.report.comparison_table import warnings_of as cell_warnings
from prunekit.report.source import ENVIRONMENT, MissingError, Section, Source
from prunekit.runtime.files import read_json
from prunekit.runtime.run_directory import RECIPE, SMOKE_SUFFIX
from prunekit.serving.routed_directory import recipe_hash

TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2}  # masked against cut (law 1), by dtype of the dense model's products
HEADER = ["model", "masked against cut", "", "predicted MACs", "counted MACs", ""]
ABOUT = (
    f"Masked against cut: the dense denoiser under the masks and the cut denoiser, before fine-tuning, on the same "
    f"noised pictures; relative error of the output, allowed "
    f"{TOLERANCES['float32']:.0e} in float32 and {TOLERANCES['bfloat16']:.0e} in bfloat16. Counted: torch's "
    "FlopCounterMode / 2 on the cut denoiser."
)
NO_CERTIFICATE = (
    "This run recorded no certificate; `prunekit report RUN --sensitivity` makes it where the model and data are here."
)


def trust(source: Source) -> Section:
    """Return the section. Raises MissingError if neither a recipe nor versions are recorded."""
    facts = _of_comparison(source) if source.is_comparison else _of_run(source)
    if not facts:
        raise MissingError("the directory records neither recipe nor versions")
    certificates = _certificates(source)
    warnings = warnings_of(source)
    content = {"facts": facts, "header": HEADER, "certificates": certificates, "warnings": warnings}
    note = ABOUT if certificates else "" if source.is_comparison else NO_CERTIFICATE
    return Section("trust", "Can it be trusted?", {**content, "note": note})


def warnings_of(source: Source) -> list[str]:
    """Return the warnings that a reader should know before relying on the figures, one sentence each."""
    warnings = [f"{warning}." for warning in _of_choices(source)]
    rows = source.results.get("table", {}).get("rows") or []
    spread = [row["name"] for row in rows if (source.metrics(row["name"], "errors") or {})]
    if rows and len(spread) < len(rows):
        warnings.append("Some figures have no interval: the run is of an older version.")
    if rows:
        warnings.append("One seed: intervals are over pictures, not over trainings.")
    ran = source.results.get("evaluator")
    if rows and not ran:
        warnings.append("The evaluator's ceiling on known pictures was not measured.")
    if str(source.recipe.get("name", "")).endswith(SMOKE_SUFFIX):
        warnings.append("scale=smoke: this run only tests the recipe; its figures have no meaning.")
    missing = source.results.get("missing") or []
    if missing:
        warnings.append(f"{len(missing)} cells of the comparison are missing.")
    warnings += [str(row["event"]) for row in source.log if str(row.get("event", "")).lower().startswith("warning")]
    return warnings


def _of_choices(source: Source) -> list[str]:
    """Return the warnings about the methods' choices, from a comparison's cells or from the results."""
    if source.is_comparison and (not source.chosen or any("warnings" in cell for cell in source.cells)):
        return cell_warnings(source.cells)
    return [f"{name}: {warning}" for name, result in source.chosen.items() for warning in result.warnings()]


def _certificates(source: Source) -> list[dict[str, Any]]:
    rows = []
    for name in source.chosen:
        certificate = None if source.is_comparison else source.metrics(name, "certificate")
        if not certificate:
            continue
        allowed = TOLERANCES[certificate.get("dtype", "float32")]
        for index, error in enumerate(certificate["errors"]):
            title = f"{name}, expert {index}" if len(certificate["errors"]) > 1 else name
            predicted, counted = certificate["predicted"][index], certificate["counted"][index]
            cells = [title, f"{error:.1e}", _verdict(error <= allowed), f"{predicted:,}", f"{counted:,}"]
            rows.append({"cells": [*cells, _verdict(predicted == counted, "equal", "differs")]})
    return rows


def _verdict(good: bool, yes: str = "passes", no: str = "fails") -> str:
    return f"✓ {yes}" if good else f"✗ {no}"


def _of_run(source: Source) -> list[tuple[str, str]]:
    recipe, facts = source.recipe, []
    if recipe:
        facts += [("seed", str(recipe.get("seed", "–"))), ("recipe", recipe_hash(source.directory))]
        facts += [("model", str(recipe.get("model", "–"))), ("data", _data(recipe))]
    elif source.results:
        facts += [("seed", str(source.results.get("seed", "–")))]
    path = source.directory / ENVIRONMENT
    if path.is_file():
        titles = {"weights": "hash of the dense denoiser", "data": "hash of the encoded data", "dtype": "weights in"}
        facts += [(titles.get(key, key), str(value)) for key, value in read_json(path).items()]
    else:
        facts += [("versions", "not recorded by this run")]
    return facts


def _of_comparison(source: Source) -> list[tuple[str, str]]:
    recipe, facts = source.recipe, []
    seeds = sorted({cell["cell"]["seed"] for cell in source.cells})
    facts += [("seeds", ", ".join(map(str, seeds)))] if seeds else []
    if (source.directory / RECIPE).is_file():
        facts += [("recipe", recipe_hash(source.directory))]
        facts += [("model", str(recipe.get("model", "–"))), ("data", _data(recipe))]
    for name, title in (("model", "hash of the dense denoiser"), ("data.content", "hash of the data")):
        facts += [(title, str(v)) for v in dict.fromkeys(cell["fields"].get(name) for cell in source.cells) if v]
    machines = dict.fromkeys(tuple(sorted(cell["environment"].items())) for cell in source.cells)
    for items in machines:
        facts += [("made with", ", ".join(f"{key} {value}" for key, value in items))]
    facts += [("finished cells", str(len(source.cells)))] if source.cells else []
    return facts


def _data(recipe: dict[str, Any]) -> str:
    data = recipe.get("data", {})
    by = data.get("holdout_by", "captions")
    held = f", {100 * data['holdout']:.0f} % of the {by} held out" if data.get("holdout") else ""
    place = f" at {data['path']}" if data.get("path") else ""
    return f"{data.get('kind', '–')}{place}{held}"
