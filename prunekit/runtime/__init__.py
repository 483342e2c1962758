"""Functions that every package uses: errors, files, processes, shared work, progress, logs, precision, randomness."""
