"""Methods side by side: the cells of a comparison, the refusal of unfair ones, and their tables."""
