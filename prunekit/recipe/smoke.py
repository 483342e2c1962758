"""`scale=smoke`: a recipe's every stage on a few samples, in minutes, on a small model too.

It works on a recipe's content before that is checked, so what is run and written down is an ordinary, small recipe.
"""

from typing import Any

from pydantic import BaseModel

from prunekit.methods import registry
from prunekit.training.trainer import TrainerConfig

TRAINING = {"steps": 2, "batch_size": 4, "micro_batch": 2, "warmup_steps": 1, "checkpoint_steps": 2}
METHOD = {"experts": 2, "warmup": 1, "samples": 4, "batch_size": 4, "num_timesteps": 2}
EVALUATION = {"num_images": 4, "steps": 2, "batch_size": 4, "num_predictions": 4, "num_pictures": 2}
LEAST_HOLDOUT = 0.1  # of a few dozen captions a published data set's share would hold out none
AT_STEP = 1  # the one step at which a recipe with evaluation.at_steps is looked at
BUDGETS = 2  # of a comparison
SUFFIX = "_smoke"  # of the name, and so of the run's directory


def smoke(content: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's content shrunk: what is larger than the figures above becomes as small as they are.

    Resolutions become the model's own, encoder and evaluator the embedded ones, and BK-SDM's variant the largest member
    within the budget, so that a recipe for a large model goes through on a small one. What is missing, or of a wrong
    type, is left to the schema.
    """
    content = _trainings(content)
    if isinstance(content.get("name"), str):
        content["name"] += SUFFIX
    if content.get("job", "prune") == "pretrain":
        content["milestones"] = []
    else:
        content["resolution"] = None
        content |= {name: "emoji" for name in ("prompt_encoder", "evaluator") if name in content}
        content["methods"] = _methods(content.get("methods"))
    if isinstance(content.get("prune"), dict):
        content["prune"] = {**content["prune"], "resolution": None}
    if isinstance(content.get("budgets"), list):
        content["budgets"] = [_one_seed(entry) for entry in content["budgets"][:BUDGETS]]
    if isinstance(data := content.get("data"), dict) and _is_number(data.get("holdout")):
        content["data"] = {**data, "holdout": max(data["holdout"], LEAST_HOLDOUT)}
    evaluation = {**EVALUATION, **_section(content, "evaluation")}
    if evaluation.get("at_steps"):
        evaluation["at_steps"] = [AT_STEP]
    return {**content, "evaluation": _capped(evaluation, EVALUATION)}


def _trainings(node: Any) -> Any:
    """Shrink every training below `node`: a mapping with a learning rate."""
    if not isinstance(node, dict):
        return node
    node = {key: _trainings(value) for key, value in node.items()}
    return _capped(node, TRAINING) if "learning_rate" in node else node


def _methods(methods: Any) -> Any:
    if not isinstance(methods, dict):
        return methods
    return {label: _method(label, own or {}) if isinstance(own, dict | None) else own for label, own in methods.items()}


def _method(label: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Shrink a method's settings, also those that it leaves at their defaults."""
    name = own.get("method", label)
    if name not in registry.names():
        return own
    fields = registry.get(name).Config.model_fields
    small = {setting: most for setting, most in METHOD.items() if setting in fields}
    for setting, field in fields.items():
        if setting not in own and isinstance(field.annotation, type) and issubclass(field.annotation, TrainerConfig):
            default = field.get_default(call_default_factory=True)
            small |= {setting: _trainings(default.model_dump())} if isinstance(default, BaseModel) else {}
    variant = {"variant": None} if "variant" in fields else {}
    return _capped({**small, **own}, METHOD) | variant


def _capped(settings: dict[str, Any], most: dict[str, int]) -> dict[str, Any]:
    """Return settings with no number above its entry in `most`."""
    lower = {key: min(value, most[key]) for key, value in settings.items() if key in most and _is_number(value)}
    return {**settings, **lower}


def _one_seed(entry: Any) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("seeds"), list):
        return entry
    return {**entry, "seeds": entry["seeds"][:1]}


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    return section if isinstance(section, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
