"""Evaluate the quality of models: evaluators, generation, distances, agreement, tables and picture sheets."""
