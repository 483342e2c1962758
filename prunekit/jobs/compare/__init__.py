"""Comparisons of methods: their cells, the check that they are fair, and their tables."""
