"""The number of training steps of each model in a comparison's row, under each protocol.

Compute is counted in forward passes of the dense model on one sample: a forward pass is 1, a backward pass 2, or 1 if
the weights are frozen. A pruned model's passes are multiplied by its share of the dense MACs.
"""

from collections.abc import Callable

from prunekit.jobs.recipe import CompareRecipe
from prunekit.methods.base import Method
from prunekit.methods.workload import MethodWork
from prunekit.report.comparison_table import EQUAL_COMPUTE, EQUAL_TOTAL, STATIC


class TrainingSteps:
    """The steps of every row of one comparison.

    Args:
        recipe: the comparison.
        work_of: returns the work that a method does before it chooses.
        budgets: the value of each budget, as a share of the dense MACs, by its label.
        layers: largest number of layers in a model that a closed-form refit fits.

    """

    def __init__(
        self,
        recipe: CompareRecipe,
        work_of: Callable[[Method], MethodWork],
        budgets: dict[str, float],
        layers: int,
    ):
        self.recipe, self.work_of, self.budgets, self.layers = recipe, work_of, budgets, layers
        self._choices: dict[tuple[str, str], float] = {}

    def of(self, label: str, budget: str, protocol: str) -> int:
        """Return the number of steps per model of a row; for a mixture, this is the mean over its experts."""
        recipe = self.recipe
        if not recipe.recovering(label).fine_tune:
            return 0
        if protocol == EQUAL_COMPUTE:
            return max(1, recipe.fine_tune.steps // recipe.method_of(label).num_models)
        if protocol != EQUAL_TOTAL:
            return recipe.fine_tune.steps
        most = max(self._passes(other, budget, recipe.fine_tune.steps) for other in self._rows(budget))
        left = most - self._before(label, budget)
        return max(1, int(left / self._step(label, budget) / self.trainings(label) + 1e-9))

    def protocols(self, label: str, budget: str) -> list[str]:
        """Return the protocols under which a row trains differently: one cell each, or one that serves all."""
        steps = {protocol: self.of(label, budget, protocol) for protocol in self.recipe.protocols}
        return [STATIC] if len(set(steps.values())) == 1 else list(steps)

    def trainings(self, label: str) -> int:
        """Return how many models of a row are trained."""
        return 1 if self.recipe.fine_tuning(label, 1).shared_backbone else self.recipe.method_of(label).num_models

    def _rows(self, budget: str) -> set[str]:
        """Return the labels of all rows at a budget, which several entries may have for different seeds."""
        entries = [entry for entry in self.recipe.budgets if entry.label == budget]
        return {label for entry in entries for label in entry.methods or self.recipe.methods}

    def _passes(self, label: str, budget: str, steps: int) -> float:
        """Return a row's compute in dense passes, if each of its models trains for `steps` steps."""
        steps = steps if self.recipe.recovering(label).fine_tune else 0
        return self._before(label, budget) + steps * self.trainings(label) * self._step(label, budget)

    def _before(self, label: str, budget: str) -> float:
        """Return a row's compute before fine-tuning, in dense passes."""
        closed_form, models = self.recipe.recovering(label).closed_form, self.trainings(label)
        refits = models * closed_form.dense_passes(self.layers, self.budgets[budget]) if closed_form else 0.0
        return self._choice(label, budget) + refits

    def _choice(self, label: str, budget: str) -> float:
        if (label, budget) not in self._choices:
            method = self.recipe.method(label, self.budgets[budget], 0)
            self._choices[label, budget] = self.work_of(method).dense_passes
        return self._choices[label, budget]

    def _step(self, label: str, budget: str) -> float:
        config = self.recipe.fine_tuning(label, self.recipe.fine_tune.steps)
        return config.batch_size * config.dense_passes(self.budgets[budget])
