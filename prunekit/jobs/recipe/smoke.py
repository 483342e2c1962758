"""`scale=smoke`: shrink a recipe so that every stage runs on a few samples, in minutes, also with a small model.

The content of the recipe is shrunk before it is checked, so a run uses and records an ordinary, small recipe.
"""

from typing import Any

from prunekit.methods import registry
from prunekit.runtime.run_directory import SMOKE_SUFFIX
from prunekit.training.memory import SMOKE, capped, is_number

EVALUATION = {
    "num_images": 4,
    "steps": 2,
    "batch_size": 4,
    "num_predictions": 4,
    "num_pictures": 2,
    "num_seen_images": 4,
}
LEAST_HOLDOUT = 0.1  # a published data set's smaller share would hold out none of a few dozen captions
CLOSED_FORM = {"samples": 4, "batch_size": 4}  # largest values for a refit
AT_STEP = 1  # the only step in evaluation.at_steps, if the recipe has any
BUDGETS = 2  # largest number of budgets in a comparison


def smoke(content: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's content with its numbers capped at the values above, and those of trainings at `SMOKE`.

    Resolutions become the model's own, encoder and evaluator the embedded ones, and BK-SDM's variant the largest member
    within the budget, so that a recipe for a large model also runs with a small one. The schema reports missing
    settings and wrong types.
    """
    content = _trainings(content)
    if isinstance(content.get("name"), str):
        content["name"] += SMOKE_SUFFIX
    if content.get("job", "prune") == "pretrain":
        content["milestones"] = []
    else:
        content["resolution"] = None
        content |= {name: "emoji" for name in ("prompt_encoder", "evaluator") if name in content}
        content["methods"] = _methods(content.get("methods"))
    if isinstance(content.get("prune"), dict):
        content["prune"] = {**content["prune"], "resolution": None}
    if isinstance(recover := content.get("recover"), dict):
        content["recover"] = _refitting(recover)
    if isinstance(content.get("budgets"), list):
        content["budgets"] = [_one_seed(entry) for entry in content["budgets"][:BUDGETS]]
    if isinstance(data := content.get("data"), dict) and is_number(data.get("holdout")):
        content["data"] = {**data, "holdout": max(data["holdout"], LEAST_HOLDOUT)}
    evaluation = {**EVALUATION, **_section(content, "evaluation")}
    if evaluation.get("at_steps"):
        evaluation["at_steps"] = [AT_STEP]
    return {**content, "evaluation": capped(evaluation, EVALUATION)}


def _trainings(node: Any) -> Any:
    """Shrink every training below `node`: a mapping with a learning rate."""
    if not isinstance(node, dict):
        return node
    node = {key: _trainings(value) for key, value in node.items()}
    return capped(node, SMOKE) if "learning_rate" in node else node


def _methods(methods: Any) -> Any:
    if not isinstance(methods, dict):
        return methods
    return {
        label: _method(label, settings or {}) if isinstance(settings, dict | None) else settings
        for label, settings in methods.items()
    }


def _method(label: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Shrink a row's settings as its method prescribes, including settings that the row leaves at their defaults."""
    name = settings.get("method", label)
    settings = _refitting(settings)
    return registry.get(name).smoke_settings(settings) if name in registry.names() else settings


def _refitting(settings: dict[str, Any]) -> dict[str, Any]:
    """Shrink the refit among settings, if they have one."""
    given = settings.get("closed_form")
    if given is True or isinstance(given, dict):
        refitting = {**CLOSED_FORM, **(given if isinstance(given, dict) else {})}
        return {**settings, "closed_form": capped(refitting, CLOSED_FORM)}
    return settings


def _one_seed(entry: Any) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("seeds"), list):
        return entry
    return {**entry, "seeds": entry["seeds"][:1]}


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    return section if isinstance(section, dict) else {}
