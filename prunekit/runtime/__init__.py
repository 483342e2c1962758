"""Functions of every package: errors, files, processes, shared work, progress, logs, precision and randomness."""
