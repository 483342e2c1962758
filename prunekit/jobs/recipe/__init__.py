"""A recipe: everything that a run depends on, in one YAML file with `key=value` overrides, checked before it starts."""

from prunekit.jobs.recipe.auto_precision import (
    load_recorded,
    precision_lines,
    precision_text,
    precisions,
    resolve_recipe,
)
from prunekit.jobs.recipe.earlier import with_added, without_added
from prunekit.jobs.recipe.faults import RecipeError
from prunekit.jobs.recipe.reading import dump_recipe, load_recipe, parse_recipe
from prunekit.jobs.recipe.schema import (
    AnyRecipe,
    BudgetEntry,
    CommonRecipe,
    CompareRecipe,
    EvaluationConfig,
    PretrainRecipe,
    PruneRecipe,
)

__all__ = [
    "AnyRecipe",
    "BudgetEntry",
    "CommonRecipe",
    "CompareRecipe",
    "EvaluationConfig",
    "PretrainRecipe",
    "PruneRecipe",
    "RecipeError",
    "dump_recipe",
    "load_recipe",
    "load_recorded",
    "parse_recipe",
    "precision_lines",
    "precision_text",
    "precisions",
    "resolve_recipe",
    "with_added",
    "without_added",
]
