"""The work behind the commands: recipes, runs, comparisons, plans, checks and benchmarks."""
