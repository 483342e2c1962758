"""Methods side by side: cells of a comparison, the refusal of unfair ones, and the table with its intervals."""
