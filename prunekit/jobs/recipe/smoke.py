"""`scale=smoke`: a recipe's every stage on a few samples, in minutes, on a small model too.

It works on a recipe's content before that is checked, so what is run and written down is an ordinary, small recipe.
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
LEAST_HOLDOUT = 0.1  # of a few dozen captions a published data set's share would hold out none
CLOSED_FORM = {"samples": 4, "batch_size": 4}  # of a refit, at most
AT_STEP = 1  # the one step at which a recipe with evaluation.at_steps is looked at
BUDGETS = 2  # of a comparison


def smoke(content: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's content shrunk: what is larger than the figures above becomes as small as they are.

    Resolutions become the model's own, encoder and evaluator the embedded ones, and BK-SDM's variant the largest member
    within the budget, so that a recipe for a large model goes through on a small one. What is missing, or of a wrong
    type, is left to the schema.
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
    """Shrink a row's settings by what its method says, also those that it leaves at their defaults."""
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
