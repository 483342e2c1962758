"""How good a model is: evaluators, generation, distances, agreement, tables and pictures."""
