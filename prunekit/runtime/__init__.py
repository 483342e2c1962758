"""What every room uses: errors, files, processes, shared work, progress, logs, precision and randomness."""
