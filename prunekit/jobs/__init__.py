"""What the commands do from beginning to end: recipes, runs, comparisons, plans, checks and benchmarks."""
